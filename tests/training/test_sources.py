"""The user's own data: what is read, how it is split, and what is said where it cannot be."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from pyarrow import csv, parquet
from pydantic import ValidationError

from family.manifest import ImageInput
from hbll.cli import main
from training.arrays import load_arrays
from training.augmentation import RandAugment, augmentation, mirror_images, shift_images
from training.checkpoint import save_spec
from training.config import ConfigError
from training.corruption import corrupt
from training.data_config import ArraysConfig, Augmented, DigitsConfig, ImagesConfig, TableConfig
from training.dataset import DataError, Dataset
from training.folders import load_images
from training.sources import load_data, load_data_of
from training.splits import stratify
from training.tables import load_table

ROWS = 100


def table(**changes: object) -> pa.Table:
    columns = {
        "id": [f"row {n}" for n in range(ROWS)],
        "height": np.linspace(1.0, 2.0, ROWS),
        "count": np.arange(ROWS),
        "flat": np.ones(ROWS),
        "species": ["cat" if n % 4 else "dog" for n in range(ROWS)],
    }
    return pa.table({**columns, **changes})


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_table_becomes_standardised_features_and_named_classes(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"pets.{suffix}"
    parquet.write_table(table(), file) if suffix == "parquet" else csv.write_csv(table(), file)
    data = load_data(TableConfig(file=file, target="species", drop=("id",)))
    assert data.spec.features == ("height", "count", "flat")
    assert data.spec.labels == ("cat", "dog")
    assert data.spec.image is None
    sizes = [len(split) for split in (data.train, data.validation, data.certification, data.test)]
    assert sizes == [60, 10, 10, 20]
    mean, std = data.spec.constants()
    scaled = (data.train.x - mean) / std
    assert scaled.mean(dim=0).tolist() == pytest.approx([0, 0, 0], abs=1e-4)
    assert scaled.std(dim=0, correction=0).tolist() == pytest.approx([1, 1, 0], abs=1e-4)
    rows = (
        torch.cat([split.x[:, 1] for split in (data.train, data.validation, data.certification, data.test)]).int().tolist()
    )
    classes = torch.cat([split.labels for split in (data.train, data.validation, data.certification, data.test)]).tolist()
    assert sorted(rows) == list(range(ROWS))
    assert all(label == (row % 4 == 0) for row, label in zip(rows, classes, strict=True))
    assert torch.equal(load_data(data.source).test.x, data.test.x)
    assert not torch.equal(load_data(data.source.model_copy(update={"seed": 1})).test.x, data.test.x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": [1.0] * 6 + [None] * 94}, r"column 'height', row 7: a value is missing"),
        ({"height": [1.0] * 6 + [float("inf")] * 94}, r"column 'height', row 7: expected a finite number, got inf"),
        ({"count": ["1"] * 3 + ["many"] * 97}, r"column 'count', row 4: expected a number, got 'many' \(string\)"),
        ({"species": ["cat"] * 99 + [None]}, r"column 'species', row 100: a value is missing"),
        ({"species": [1.5] * 100}, r"column 'species', row 1: expected a class, a whole number or text, got 1.5"),
        (
            {"species": [1.0, float("inf")] * 50},
            r"column 'species', row 2: expected a class, a whole number or text, got inf",
        ),
        ({"species": list(range(100))}, r"class '0' has 1 rows, too few .* this is no regression"),
        ({"species": ["cat"] * 100}, r"expected at least two classes, got cat"),
    ],
    ids=["null", "inf", "text", "no-class", "numbers", "infinite-class", "regression", "one"],
)
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_value_that_cannot_be_used_is_named_by_column_and_row(
    tmp_path: Path, suffix: str, changes: dict[str, object], message: str
) -> None:
    file = tmp_path / f"pets.{suffix}"
    rows = table(**changes)
    parquet.write_table(rows, file) if suffix == "parquet" else csv.write_csv(rows, file)
    with pytest.raises(DataError, match=f"pets.{suffix}.*{message}" if "class '0'" not in message else message):
        load_table(TableConfig(file=file, target="species", drop=("id",)))


@pytest.mark.parametrize(
    ("target", "drop", "message"),
    [
        ("breed", (), "has no column 'breed', but 'id', 'height', 'count', 'flat', 'species'"),
        ("species", ("age",), "has no column 'age'"),
        ("species", ("id", "height", "count", "flat"), "expected columns of numbers beside 'species', got none"),
        ("species", (), "column 'id', row 1: expected a number, got 'row 0'.*data.drop"),
    ],
)
def test_a_column_that_is_not_there_is_named(tmp_path: Path, target: str, drop: tuple[str, ...], message: str) -> None:
    parquet.write_table(table(), tmp_path / "pets.parquet")
    with pytest.raises(DataError, match=message):
        load_table(TableConfig(file=tmp_path / "pets.parquet", target=target, drop=drop))


def test_files_that_are_no_tables_are_named(tmp_path: Path) -> None:
    for name, message in (
        ("a.parquet", "cannot read the table"),
        ("a.xlsx", "expected a .parquet or .csv file, got .xlsx"),
    ):
        (tmp_path / name).write_bytes(b"no table")
        with pytest.raises(DataError, match=message):
            load_table(TableConfig(file=tmp_path / name, target="y"))
    (tmp_path / "twice.csv").write_text("a,a,y\n1,2,3\n")
    with pytest.raises(DataError, match="several columns 'a'"):
        load_table(TableConfig(file=tmp_path / "twice.csv", target="y"))
    (tmp_path / "utf16.csv").write_bytes(b"\xff\xfe\0a,y\n1,2\n")
    with pytest.raises(DataError, match=r"utf16.csv: expected UTF-8"):
        load_table(TableConfig(file=tmp_path / "utf16.csv", target="y"))
    with pytest.raises(DataError, match=r"cannot read the table .*missing.csv"):
        load_table(TableConfig(file=tmp_path / "missing.csv", target="y"))


def test_classes_are_text_in_utf_8_and_no_bytes(tmp_path: Path) -> None:
    """Bug found: one letter in Latin-1 made all labels look like b'f\\xfcr'."""
    parquet.write_table(
        table(species=[b"F\xc3\xbcchse" if n % 4 else b"dog" for n in range(ROWS)]), tmp_path / "pets.parquet"
    )
    config = TableConfig(file=tmp_path / "pets.parquet", target="species", drop=("id",))
    assert load_table(config).spec.labels == ("F\xfcchse", "dog")
    csv.write_csv(table(), tmp_path / "pets.csv")
    file = tmp_path / "latin.csv"
    file.write_bytes((tmp_path / "pets.csv").read_bytes().replace(b"cat", b"f\xfcr", 1))
    with pytest.raises(DataError, match=r"latin.csv, column 'species', row 2: expected text in UTF-8, .* save the file as"):
        load_table(TableConfig(file=file, target="species", drop=("id",)))


@pytest.mark.parametrize(("suffix", "name"), [("parquet", "__index_level_0__"), ("csv", "")])
def test_row_numbers_that_pandas_wrote_along_are_no_feature(tmp_path: Path, suffix: str, name: str) -> None:
    """Bug found: in a table that is sorted by class they tell the class, and nobody had asked for them."""
    file, rows = tmp_path / f"pets.{suffix}", table(**{name: range(ROWS)}).drop(["id"])
    parquet.write_table(rows, file) if suffix == "parquet" else csv.write_csv(rows, file)
    with pytest.raises(DataError, match=rf"column '{name}' is the numbers of rows that pandas writes.*data.drop"):
        load_table(TableConfig(file=file, target="species"))
    assert load_table(TableConfig(file=file, target="species", drop=(name,))).spec.features == ("height", "count", "flat")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow: pip install 'hbll-anytime\[data\]'"):
        load_table(TableConfig(file=tmp_path / "pets.csv", target="y"))


def test_a_split_can_be_a_file_of_its_own(tmp_path: Path) -> None:
    parquet.write_table(table(), tmp_path / "pets.parquet")
    csv.write_csv(table().select(["species", "flat", "height", "count"]).slice(0, 30), tmp_path / "test.csv")
    config = TableConfig(file=tmp_path / "pets.parquet", target="species", drop=("id",), test=tmp_path / "test.csv")
    data = load_table(config)
    assert [len(split) for split in (data.train, data.validation, data.certification, data.test)] == [80, 10, 10, 30]
    assert data.test.x[:, 1].tolist() == list(range(30))  # columns are found by name
    csv.write_csv(table(species=["cow"] * ROWS), tmp_path / "test.csv")
    with pytest.raises(DataError, match=r"test.csv, row 1: no row to train on has the class 'cow'"):
        load_table(config)


@pytest.mark.parametrize("shares", [{"test": 1.0}, {"test": 0.0}, {"test": 0.8, "validation": 0.1}])
def test_shares_must_leave_rows_to_train(shares: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=r"a share between 0 and 1|must leave rows to train on"):
        TableConfig(file="a.csv", target="y", **shares)


def test_every_class_has_its_share_of_each_split() -> None:
    classes = np.repeat([0, 1, 2], [10, 100, 1000])
    parts = stratify(classes, {"validation": 0.1, "test": 0.2}, ("a", "b", "c"), seed=3)
    assert [np.bincount(classes[rows]).tolist() for rows in parts.values()] == [[7, 70, 700], [1, 10, 100], [2, 20, 200]]
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(1110))


def test_arrays_of_numbers_and_of_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    np.savez(tmp_path / "numbers.npz", x=rng.standard_normal((60, 2, 5)), y=y)
    np.savez(tmp_path / "pixels.npz", x=rng.integers(0, 256, (60, 6, 4, 3), dtype=np.uint8), y=y)
    numbers = load_arrays(ArraysConfig(file=tmp_path / "numbers.npz"))
    assert (numbers.spec.input_shape, numbers.spec.labels, numbers.spec.image) == ((2, 5), ("0", "1", "2"), None)
    assert len(numbers.spec.normalisation.mean) == 1
    pixels = load_arrays(ArraysConfig(file=tmp_path / "pixels.npz", pixels=True, shift=1, flip=True))
    assert pixels.spec.image == ImageInput(height=6, width=4, channels=3)
    assert pixels.train.x.shape == (36, 3, 6, 4)
    assert 0 <= pixels.train.x.min() < 0.1 < 0.9 < pixels.train.x.max() <= 1
    assert len(pixels.spec.normalisation.mean) == 3
    assert pixels.augment(pixels.train.x, rng).shape == pixels.train.x.shape


@pytest.mark.parametrize(
    ("arrays", "config", "message"),
    [
        ({"x": np.zeros((4, 2))}, {}, "lacks y"),
        ({"x": np.zeros(4), "y": np.zeros(4, int)}, {}, r"expected x of \(rows, ...\) and y of \(rows,\)"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(3, int)}, {}, r"got shapes \[4, 2\] and \[3\]"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(4)}, {}, "expected y to be classes, whole numbers or text, got float64"),
        ({"x": np.full((4, 2), np.nan), "y": np.zeros(4, int)}, {}, r"got nan in row 1 of x, at \[0\]"),
        ({"x": np.array([["a"]] * 4), "y": np.zeros(4, int)}, {}, "expected x to be numbers"),
        ({"x": np.zeros((4, 2, 2)), "y": np.zeros(4, int)}, {"pixels": True}, "expected x to be images, uint8"),
        ({"x": np.array([[object()]] * 4), "y": np.zeros(4, int)}, {}, "is no .npz file of plain arrays"),
    ],
    ids=["lacks", "axes", "rows", "classes", "nan", "text", "pixels", "pickled"],
)  # fmt: skip
def test_arrays_that_cannot_be_used_are_named(
    tmp_path: Path, arrays: dict[str, np.ndarray], config: dict[str, bool], message: str
) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(DataError, match=rf"data.npz.*{message}"):
        load_arrays(ArraysConfig(file=tmp_path / "data.npz", **config))


def test_an_archive_is_refused_whatever_of_it_is_damaged(tmp_path: Path) -> None:
    """Bug found: zlib.error, NotImplementedError or tokenize.TokenError, by which bytes were wrong."""
    whole, damaged = tmp_path / "whole.npz", tmp_path / "data.npz"
    np.savez_compressed(whole, x=np.arange(80.0).reshape(40, 2), y=np.arange(40) % 2)
    rng, refused = np.random.default_rng(0), 0
    for _ in range(300):
        data = bytearray(whole.read_bytes())
        for place in rng.integers(len(data), size=3):
            data[place] = rng.integers(256)
        damaged.write_bytes(data)
        try:
            load_arrays(ArraysConfig(file=damaged))
        except DataError:
            refused += 1
    assert refused > 200


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Twelve reddish cats and twelve bluish dogs, of two formats and sizes, beside files that are no images."""
    for name, colour in (("cats", (200, 50, 0)), ("dogs", (0, 50, 200))):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(12):
            image = Image.new("RGB", (20 + number, 10), colour)
            image.save(tmp_path / "pets" / name / f"{number}.{'png' if number % 2 else 'JPG'}", "png")
        (tmp_path / "pets" / name / "notes.txt").write_text("not an image")
    (tmp_path / "pets" / ".hidden").mkdir()
    return tmp_path / "pets"


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_folder_becomes_rows_of_its_classes(pets: Path, channels: int) -> None:
    data = load_images(ImagesConfig(folder=pets, height=8, width=6, channels=channels))
    assert data.spec.labels == ("cats", "dogs")
    assert data.spec.image == ImageInput(height=8, width=6, channels=channels)
    assert data.train.x.shape == ((16, 8, 6) if channels == 1 else (16, 3, 8, 6))
    if channels == 3:
        colours = data.train.x.mean(dim=(2, 3))
        assert torch.equal(colours[:, 2] > colours[:, 0], data.train.labels == 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pets: (pets / "cats" / "1.png").write_bytes(b"no image"), r"cats/1.png is no PNG"),
        (lambda pets: (pets / "cats" / "1.png").write_bytes((pets / "cats" / "1.png").read_bytes()[:-30]), r"1.png is damaged"),
        (lambda pets: Image.new("L", (400, 400)).save(pets / "dogs" / "3.png"), r"3.png: expected at most 10000 pixels, got 400"),
        (lambda pets: (pets / "empty").mkdir(), r"no .png, .* file in empty"),
        (lambda pets: Image.new("L", (8, 8)).save(pets / "cats" / "1.png", "TIFF"), r"cats/1.png is no PNG"),
        (lambda pets: Image.new("RGB", (8, 8)).save(pets / "cats" / "1.png", "AVIF"), r"cats/1.png is no PNG"),
    ],
    ids=["no-image", "truncated", "large", "empty", "tiff", "avif"],
)  # fmt: skip
def test_an_image_that_cannot_be_read_is_named(pets: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(pets)
    with pytest.raises(DataError, match=message):
        load_images(ImagesConfig(folder=pets, max_pixels=10_000))


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_what_is_no_image_to_read_is_told(pets: Path, dry: list[str]) -> None:
    """Bug found: half of the photographs were in formats that are not read, and nobody heard of it."""
    (pets / "cats" / "kittens").mkdir()
    for name in ("dogs/1.tiff", "dogs/2.TIFF", "cats/3.heic", "stray.png", "cats/.DS_Store"):
        (pets / name).write_bytes(b"")
    chosen = ["data.kind=images", f"data.folder={pets}", "model.kind=mlp", "train.batch=4", "train.budget=1"]
    settings = [part for text in chosen for part in ("--set", text)]
    result = CliRunner().invoke(main, ["train", "--out", str(pets.parent / "run"), *settings, *dry])
    assert result.exit_code == 0, result.output
    told = (
        "1 .heic files, 1 .png files, 2 .tiff files, 2 .txt files, 1 folders in folders of classes: images are CLASS/NAME"
    )
    assert told in " ".join(result.output.split())


def test_a_folder_without_classes_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected one subfolder of images for each class"):
        load_images(ImagesConfig(folder=tmp_path))
    with pytest.raises(DataError, match=r"cannot read the folder .*nowhere"):
        load_images(ImagesConfig(folder=tmp_path / "nowhere"))


def test_data_that_changed_since_training_are_refused(tmp_path: Path) -> None:
    """Another split of other rows: what was trained on would be tested on."""
    file = tmp_path / "pets.parquet"
    parquet.write_table(table(), file)
    config = TableConfig(file=file, target="species", drop=("id",))
    save_spec(tmp_path, load_data(config).spec)
    assert len(load_data_of(tmp_path, config).test) == 20
    parquet.write_table(table(height=np.linspace(1.0, 2.1, ROWS)), file)
    with pytest.raises(DataError, match=r"these are not the data that .* was trained on"):
        load_data_of(tmp_path, config)


def test_each_split_is_known_again_not_only_the_rows_that_were_trained_on(tmp_path: Path) -> None:
    """Bug found: the training rows put in the place of the test file, or another split of the same means, went unnoticed."""
    for name, first in (("train", 0), ("check", 100), ("test", 200)):
        csv.write_csv(pa.table({"a": range(first, first + 60), "y": [n % 2 for n in range(60)]}), tmp_path / f"{name}.csv")
    config = TableConfig(
        file=tmp_path / "train.csv", target="y", certification=tmp_path / "check.csv", test=tmp_path / "test.csv"
    )
    data = load_data(config)
    save_spec(tmp_path, data.spec_to_keep())
    assert len(load_data_of(tmp_path, config).test) == 60
    for name in ("check", "test"):
        shutil.copy(tmp_path / "train.csv", tmp_path / f"{name}.csv")
    with pytest.raises(DataError, match=r"was trained on: the rows or labels of certification, test differ"):
        load_data_of(tmp_path, config)
    save_spec(tmp_path, data.spec)  # as runs did before there were digests
    load_data_of(tmp_path, config)


@pytest.mark.parametrize(
    "places", [{"test": "data.csv"}, {"test": "sub/../data.csv"}, {"validation": "v.csv", "test": "v.csv"}]
)
def test_no_file_is_two_splits(places: dict[str, str]) -> None:
    """Bug found: a test file that is the training file gave a table of very good scores."""
    with pytest.raises(ValidationError, match=r"(test and file|validation and test) must be different places"):
        TableConfig(file="data.csv", target="y", **places)


def test_missing_values_are_the_mean_in_every_split_and_wrong_labels_in_training_alone(digits: Dataset) -> None:
    config = DigitsConfig(missing=0.3, label_noise=0.2)
    worse = corrupt(digits, config, seed=0)
    mean = torch.tensor(0.1307)
    for name in ("train", "validation", "certification", "test"):
        plain, changed = getattr(digits, name), getattr(worse, name)
        gone = changed.x == mean
        assert gone.double().mean().item() == pytest.approx(0.3, abs=0.01)
        assert torch.equal(changed.x[~gone], plain.x[~gone])
        wrong = (changed.labels != plain.labels).double().mean().item()
        assert wrong == pytest.approx(0.2 if name == "train" else 0, abs=1e-9)
    assert sorted(set(worse.train.labels.tolist())) == list(range(10))
    assert worse.spec.description == "digits, shift 4, 30% of values missing, 20% of training labels wrong"
    assert worse.source == config
    assert torch.equal(corrupt(digits, config, seed=0).train.labels, worse.train.labels)


def test_a_pixel_is_missing_in_all_its_colours(pets: Path) -> None:
    plain = ImagesConfig(folder=pets, height=16, width=16)
    data, worse = load_data(plain), load_data(plain.model_copy(update={"missing": 0.5}))
    gone = worse.train.x != data.train.x
    assert torch.equal(gone[:, 0], gone[:, 2])
    assert 0.45 < gone[:, 0].double().mean() < 0.55


def test_shifts_move_all_colours_of_an_image_alike() -> None:
    images = torch.arange(3 * 3 * 5 * 5).float().reshape(3, 3, 5, 5) + 1
    moved = shift_images(images, 2, np.random.default_rng(0))
    for colour in range(3):
        assert torch.equal(moved[:, colour], shift_images(images[:, colour], 2, np.random.default_rng(0)))
    assert not torch.equal(moved, images)


@pytest.mark.parametrize("shape", [(400, 2, 3), (400, 3, 2, 3)])
def test_half_of_the_images_are_mirrored(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape)
    result = mirror_images(images, np.random.default_rng(0))
    mirrored = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(result, images, strict=True)])
    assert 150 < mirrored.sum() < 250
    assert torch.equal(result[~mirrored], images[~mirrored])
    assert torch.equal(augmentation(Augmented(), None)(images, np.random.default_rng(0)), images)


def test_rand_augment_distorts_each_image_in_its_own_way() -> None:
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))
    images = image.expand(64, 3, 16, 16).clone()
    before = torch.random.get_rng_state()
    augment = augmentation(Augmented(rand_augment=9), ImageInput(height=16, width=16, channels=3))
    result = augment(images, np.random.default_rng(0))
    assert result.shape == images.shape
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert result.max() <= 1
    assert len(torch.unique(result.flatten(1), dim=0)) > 40  # fifteen operations, two at a time, with signs
    assert torch.equal(images, image.expand(64, 3, 16, 16)), "the data themselves are not changed"
    assert torch.equal(result, augment(images, np.random.default_rng(0)))
    assert not torch.equal(result, augment(images, np.random.default_rng(1)))
    assert torch.equal(torch.random.get_rng_state(), before), "a run's own generator goes on as without"


def test_rand_augment_is_for_colours() -> None:
    with pytest.raises(ConfigError, match="3 channels, got grey"):
        augmentation(Augmented(rand_augment=9), ImageInput(height=16, width=16))


def test_rand_augment_says_which_package_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia.augmentation.auto", None)
    with pytest.raises(ConfigError, match=r"hbll-anytime\[augment\]"):
        RandAugment(9)
