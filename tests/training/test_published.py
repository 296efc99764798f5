"""Small files in the published formats; the real ones differ in size alone."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import struct
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from hbll.cli import main
from training.data_config import PublishedConfig
from training.dataset import DataError
from training.published import PUBLICATIONS, download
from training.sources import load_data

RNG = np.random.default_rng(0)


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def _cifar(labels: np.ndarray, pixels: np.ndarray) -> bytes:
    """`labels` (rows, label bytes), `pixels` (rows, 3, 32, 32)."""
    return np.concatenate([labels, pixels.reshape(len(pixels), -1)], axis=1).astype(np.uint8).tobytes()


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


DIGITS = {
    part: (RNG.integers(0, 256, (rows, 28, 28), np.uint8), np.arange(rows) % 10)
    for part, rows in (("train", 200), ("t10k", 50))
}
TEN = [(np.arange(20)[:, None] % 10, RNG.integers(0, 256, (20, 3, 32, 32), np.uint8)) for _ in range(6)]
NAMES = [f"thing {n}" for n in range(10)]
HUNDRED_LABELS = np.stack([np.arange(400) % 20, np.arange(400) % 100], axis=1)
HUNDRED_PIXELS = RNG.integers(0, 256, (400, 3, 32, 32), np.uint8)


def files_of(kind: str) -> dict[str, bytes]:
    if kind == "mnist":
        return {
            f"{part}-{what}-ubyte.gz": gzip.compress(_idx(array.astype(np.uint8)))
            for part, arrays in DIGITS.items()
            for what, array in zip(("images-idx3", "labels-idx1"), arrays, strict=True)
        }
    if kind == "cifar10":
        names = (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin")
        members = {f"cifar-10-batches-bin/{name}": _cifar(*part) for name, part in zip(names, TEN, strict=True)}
        meta = ("\n".join(NAMES) + "\n\n").encode()  # the published file ends with an empty line
        return {"cifar-10-binary.tar.gz": _tar(members | {"cifar-10-batches-bin/batches.meta.txt": meta})}
    content = _cifar(HUNDRED_LABELS, HUNDRED_PIXELS)
    fine = "\n".join(f"fine {n}" for n in range(100)).encode()
    members = {"train.bin": content, "test.bin": content[: 3074 * 100], "fine_label_names.txt": fine}
    return {"cifar-100-binary.tar.gz": _tar({f"cifar-100-binary/{name}": data for name, data in members.items()})}


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Our small files are the published ones: their MD5 is what is expected, a server of ours has them."""
    served = tmp_path / "served"
    served.mkdir()
    handler = partial(_Quiet, directory=str(served))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for kind, publication in PUBLICATIONS.items():
        files = files_of(kind)
        assert files.keys() == publication.files.keys()
        for name, content in files.items():
            (served / name).write_bytes(content)
        digests = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
        small = replace(publication, url=f"http://127.0.0.1:{server.server_port}/", files=digests)
        monkeypatch.setitem(PUBLICATIONS, kind, small)
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_mnist_is_read_from_its_idx_files(publish: Path) -> None:
    data = load_data(PublishedConfig(kind="mnist", folder=publish, validation=0.1, certification=0.2))
    assert [len(split) for split in (data.train, data.validation, data.certification, data.test)] == [140, 20, 40, 50]
    pixels, classes = DIGITS["t10k"]
    assert torch.equal(data.test.x, torch.from_numpy(pixels.astype(np.float32) / 255))
    assert data.test.labels.tolist() == classes.tolist()
    assert data.spec.image is not None
    assert data.spec.image.row_shape == data.spec.input_shape == (28, 28)


def test_cifar_10_is_read_from_its_binary_archive(publish: Path) -> None:
    data = load_data(PublishedConfig(kind="cifar10", folder=publish, shift=4, flip=True))
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
    content = _tar({"cifar-100-binary/train.bin": b""})
    (publish / "cifar-100-binary.tar.gz").write_bytes(content)
    digests = {"cifar-100-binary.tar.gz": hashlib.md5(content).hexdigest()}
    monkeypatch.setitem(PUBLICATIONS, "cifar100", replace(PUBLICATIONS["cifar100"], files=digests))
    with pytest.raises(DataError, match=r"cifar-100-binary.tar.gz lacks cifar-100-binary/"):
        load_data(PublishedConfig(kind="cifar100", folder=publish))


def test_what_is_not_there_is_fetched_and_nothing_else(publish: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "mnist"
    config = PublishedConfig(kind="mnist", folder=folder)
    told: dict[str, tuple[int, int | None]] = {}
    download(config, lambda name, done, total: told.__setitem__(name, (done, total)))
    assert {file.name for file in folder.iterdir()} == PUBLICATIONS["mnist"].files.keys() == told.keys()
    assert all(done == total for done, total in told.values())
    assert len(load_data(config).test) == 50
    told.clear()
    download(config, lambda name, done, total: told.__setitem__(name, (done, total)))
    assert told == {}


def test_a_download_that_is_another_file_leaves_nothing(publish: Path, tmp_path: Path) -> None:
    config = PublishedConfig(kind="cifar10", folder=tmp_path / "new")
    (publish / "cifar-10-binary.tar.gz").write_bytes(b"an apology")
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz is not the published file"):
        download(config, lambda *_: None)
    (publish / "cifar-10-binary.tar.gz").unlink()
    with pytest.raises(DataError, match=r"cannot download http.*cifar-10-binary.tar.gz.*404"):
        download(config, lambda *_: None)
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
