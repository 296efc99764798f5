from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from hbll.cli import main
from tests.training.published import DIGITS, NAMES, TEN, tar
from training.data_config import PublishedConfig, TextConfig
from training.dataset import DataError
from training.publications import IMAGES, TEXTS, download
from training.sources import load_data


def test_mnist_is_read_from_its_idx_files(publish: Path) -> None:
    data = load_data(PublishedConfig(kind="mnist", folder=publish, validation=0.1, certification=0.2))
    assert [len(split) for split in (data.train, data.validation, data.certification, data.test)] == [140, 20, 40, 50]
    pixels, classes = DIGITS["t10k"]
    assert torch.equal(data.test.x, torch.from_numpy(pixels.astype(np.float32) / 255))
    assert data.test.labels.tolist() == classes.tolist()
    assert data.spec.image is not None
    assert data.spec.image.row_shape == data.spec.input_shape == (28, 28)


def test_cifar_10_is_read_from_its_binary_archive(publish: Path) -> None:
    data = load_data(PublishedConfig(kind="cifar10", folder=publish, shift=4, flip=True, rand_augment=9))
    assert data.spec.labels == tuple(NAMES)
    assert len(data.train) == 80
    labels, pixels = TEN[5]
    assert torch.equal(data.test.x, torch.from_numpy(pixels.astype(np.float32) / 255))
    assert data.test.labels.tolist() == labels[:, 0].tolist()
    assert data.spec.image is not None
    assert data.spec.image.row_shape == data.spec.input_shape == (3, 32, 32)
    assert data.augment(data.train.x, np.random.default_rng(0)).shape == data.train.x.shape


def test_cifar_100_has_its_fine_labels(publish: Path) -> None:
    data = load_data(PublishedConfig(kind="cifar100", folder=publish))
    assert len(data.spec.labels) == 100
    assert data.test.labels.tolist() == list(range(100))


def test_a_file_that_is_missing_or_not_the_published_one_is_named(publish: Path) -> None:
    file = publish / "t10k-labels-idx1-ubyte.gz"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz is not the published file: expected MD5"):
        load_data(PublishedConfig(kind="mnist", folder=publish))
    file.unlink()
    with pytest.raises(DataError, match=r"MNIST needs .*t10k-labels-idx1-ubyte.gz.*--download"):
        load_data(PublishedConfig(kind="mnist", folder=publish))


def test_an_archive_that_lacks_a_part_is_named(publish: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = tar({"cifar-100-binary/train.bin": b""})
    (publish / "cifar-100-binary.tar.gz").write_bytes(content)
    digests = {"cifar-100-binary.tar.gz": hashlib.md5(content).hexdigest()}
    monkeypatch.setitem(IMAGES, "cifar100", replace(IMAGES["cifar100"], files=digests))
    with pytest.raises(DataError, match=r"cifar-100-binary.tar.gz lacks cifar-100-binary/"):
        load_data(PublishedConfig(kind="cifar100", folder=publish))


def test_wikitext_is_read_from_its_archive(publish: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_data(TextConfig(folder=publish, context=5))
    assert data.spec.description == "text: WikiText-103"
    assert bytes(data.test.x[0].tolist()) == b"None "
    file = publish / "wikitext-103-raw-v1.zip"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"wikitext-103-raw-v1.zip is not the published file"):
        load_data(TextConfig(folder=publish, context=5))
    digests = {file.name: hashlib.md5(file.read_bytes()).hexdigest()}
    monkeypatch.setitem(TEXTS, "wikitext103", replace(TEXTS["wikitext103"], files=digests))
    with pytest.raises(DataError, match=r"wikitext-103-raw-v1.zip cannot be read"):
        load_data(TextConfig(folder=publish, context=5))


def test_what_is_not_there_is_fetched_and_nothing_else(publish: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "mnist"
    config = PublishedConfig(kind="mnist", folder=folder)
    told: dict[str, tuple[int, int | None]] = {}
    download(IMAGES[config.kind], config.folder, lambda name, done, total: told.__setitem__(name, (done, total)))
    assert {file.name for file in folder.iterdir()} == IMAGES["mnist"].files.keys() == told.keys()
    assert all(done == total for done, total in told.values())
    assert len(load_data(config).test) == 50
    told.clear()
    download(IMAGES[config.kind], config.folder, lambda name, done, total: told.__setitem__(name, (done, total)))
    assert told == {}


def test_a_download_that_is_another_file_leaves_nothing(publish: Path, tmp_path: Path) -> None:
    config = PublishedConfig(kind="cifar10", folder=tmp_path / "new")
    (publish / "cifar-10-binary.tar.gz").write_bytes(b"an apology")
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz is not the published file"):
        download(IMAGES[config.kind], config.folder, lambda *_: None)
    (publish / "cifar-10-binary.tar.gz").unlink()
    with pytest.raises(DataError, match=r"cannot download http.*cifar-10-binary.tar.gz.*404"):
        download(IMAGES[config.kind], config.folder, lambda *_: None)
    assert list((tmp_path / "new").iterdir()) == []


def test_the_command_line_downloads_only_when_told_to(publish: Path, tmp_path: Path) -> None:
    settings = ["--set", "data.kind=mnist", "--set", f"data.folder={tmp_path / 'here'}", "--out", str(tmp_path / "run")]
    refused = CliRunner().invoke(main, ["train", *settings, "--dry-run"])
    assert refused.exit_code == 1
    assert "--download" in refused.output
    done = CliRunner().invoke(main, ["train", *settings, "--dry-run", "--download"])
    assert done.exit_code == 0, done.output
    assert "# data: MNIST; 180 train, 10 validation, 10 certification, 50 test; rows of [28, 28], 10 classes" in done.output
    refused = CliRunner().invoke(main, ["train", "--dry-run", "--download"])
    assert "--download goes with data.kind mnist, cifar10 and cifar100, not with digits" in " ".join(refused.output.split())
