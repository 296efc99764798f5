"""MNIST, CIFAR-10, CIFAR-100 and WikiText-103 as they are published: files in a folder, each checked against its MD5.

The formats are MNIST's IDX files, CIFAR's binary version and WikiText's text, so nothing is unpickled. Archives are read
where they are and never unpacked. Nothing is downloaded unless `download` is called.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import torch
from numpy.typing import NDArray

from family.manifest import ImageInput
from training.augmentation import augmentation
from training.data_config import PublishedConfig
from training.dataset import DataError, Dataset, DataSpec, Split, measure_normalisation
from training.splits import stratify

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30.0
_CIFAR_SIDE = 32


class _Images(NamedTuple):
    """`pixels` `(rows, *row_shape) uint8` and `classes` `(rows,) int64`."""

    pixels: NDArray[np.uint8]
    classes: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Publication:
    """Where a data set is published, and its files with their MD5: the authors', for MNIST torchvision's, and for
    WikiText-103 the one that its users agree on."""

    title: str
    url: str
    files: dict[str, str]

    def require(self, folder: Path) -> None:
        """Check that all files are in `folder`, and are the published ones.

        Raises:
            DataError: one is not; the message names it, and says where it is published.
        """
        for name, md5 in self.files.items():
            _require(folder / name, md5, self)


@dataclass(frozen=True, slots=True)
class ImagePublication(Publication):
    """A published set of images. `read`: from the folder, the training and test images and the names of the classes."""

    read: Callable[[Path], tuple[_Images, _Images, tuple[str, ...]]]


def load_published(config: PublishedConfig) -> Dataset:
    """Read a published data set from `config.folder`; validation and certification rows are drawn from its training rows.

    Raises:
        DataError: a file is missing, or is not the published one; the message names it.
    """
    publication = IMAGES[config.kind]
    publication.require(config.folder)
    train, test, labels = publication.read(config.folder)
    drawn = stratify(train.classes, config.shares, labels, config.seed)
    splits = {name: _split(train.pixels[rows], train.classes[rows]) for name, rows in drawn.items()}
    shape = tuple(train.pixels.shape[1:])
    colour = len(shape) == 3
    image = ImageInput(height=shape[-2], width=shape[-1], channels=3 if colour else 1)
    spec = DataSpec(
        description=publication.title,
        input_shape=shape,
        labels=labels,
        normalisation=measure_normalisation(splits["train"].x, by_first_axis=colour),
        image=image,
    )
    return Dataset(
        train=splits["train"],
        validation=splits["validation"],
        certification=splits["certification"],
        test=_split(*test),
        spec=spec,
        source=config,
        augment=augmentation(config, image),
    )


def read_wikitext(folder: Path) -> tuple[str, str, str]:
    """The text of WikiText-103's training, validation and test split, from the archive in `folder`.

    Raises:
        DataError: the archive is missing, or is not the published one.
    """
    publication = TEXTS["wikitext103"]
    publication.require(folder)
    (name,) = publication.files
    file = folder / name
    try:
        with zipfile.ZipFile(file) as archive:
            train, validation, test = (
                archive.read(f"wikitext-103-raw/wiki.{split}.raw").decode() for split in ("train", "valid", "test")
            )
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as exc:
        raise DataError(f"{file} cannot be read: {exc}") from exc
    return train, validation, test


def download(publication: Publication, folder: Path, report: Callable[[str, int, int | None], None]) -> None:
    """Fetch the files of a publication that `folder` lacks. Each appears whole, once its MD5 is right.

    `report` is told a file's name, the bytes that are there of it, and how many there will be, if the server says so.

    Raises:
        DataError: the server does not answer, or sends another file; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, md5 in publication.files.items():
        target = folder / name
        if target.exists():
            continue
        temporary = target.with_name(f".{name}.part")
        url = publication.url + name
        try:
            got = _fetch(url, temporary, partial(report, name))
            if got != md5:
                raise DataError(f"{url} is not the published file: expected MD5 {md5}, got {got}")
            temporary.replace(target)
        except (httpx.HTTPError, OSError) as exc:
            raise DataError(f"cannot download {url}: {exc}") from exc
        finally:
            temporary.unlink(missing_ok=True)


def _fetch(url: str, target: Path, report: Callable[[int, int | None], None]) -> str:
    """Write what is at `url` to `target` and return its MD5."""
    digest = _md5()
    with httpx.stream("GET", url, follow_redirects=True, timeout=_TIMEOUT_S) as response, target.open("wb") as file:
        response.raise_for_status()
        length = response.headers.get("content-length")
        for chunk in response.iter_raw(_CHUNK_BYTES):  # raw: a server that says gzip of a .gz must not have it unpacked
            digest.update(chunk)
            file.write(chunk)
            report(file.tell(), int(length) if length else None)
    return digest.hexdigest()


def _require(file: Path, md5: str, publication: Publication) -> None:
    digest = _md5()
    try:
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as exc:
        raise DataError(
            f"{publication.title} needs {file}, which cannot be read ({exc.strerror}): put the file from {publication.url} "
            "there, or let --download fetch it"
        ) from exc
    if digest.hexdigest() != md5:
        raise DataError(f"{file} is not the published file: expected MD5 {md5}, got {digest.hexdigest()}: fetch it again")


def _md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)  # what is published; it finds damage, not malice


def _split(pixels: NDArray[np.uint8], classes: NDArray[np.int64]) -> Split:
    return Split(torch.from_numpy(pixels.astype(np.float32) / np.float32(255)), torch.from_numpy(classes))


def _read_mnist(folder: Path) -> tuple[_Images, _Images, tuple[str, ...]]:
    def images(part: str) -> _Images:
        pixels = _idx(folder / f"{part}-images-idx3-ubyte.gz", axes=3)
        classes = _idx(folder / f"{part}-labels-idx1-ubyte.gz", axes=1)
        if len(pixels) != len(classes):
            raise DataError(f"{folder}: {len(pixels)} {part} images have {len(classes)} labels")
        return _Images(pixels, classes.astype(np.int64))

    return images("train"), images("t10k"), tuple(map(str, range(10)))


def _idx(file: Path, axes: int) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes: two zero bytes, type 8, the number of axes, their sizes big-endian, the values."""
    try:
        content = gzip.decompress(file.read_bytes())
        zero, kind, count, *shape = struct.unpack_from(f">HBB{axes}I", content)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, struct.error, ValueError) as exc:
        raise DataError(f"{file} cannot be read: {exc}") from exc
    if (zero, kind, count) != (0, 8, axes):
        raise DataError(f"{file}: expected an IDX file of bytes (type 8) with {axes} axes, got type {kind} with {count}")
    return values


def _read_cifar(
    archive: str, folder_in: str, parts: tuple[str, ...], test: str, names: str, label_bytes: int
) -> Callable[[Path], tuple[_Images, _Images, tuple[str, ...]]]:
    """A reader of CIFAR's binary version: records of `label_bytes`, of which the last is the class, and 3,072 pixels: all
    red ones, all green, all blue, each row by row."""

    def read(folder: Path) -> tuple[_Images, _Images, tuple[str, ...]]:
        wanted = {f"{folder_in}/{name}" for name in (*parts, test, names)}
        found: dict[str, bytes] = {}
        file = folder / archive
        try:
            with tarfile.open(file, "r:gz") as opened:
                for member in opened:
                    if member.name in wanted and (content := opened.extractfile(member)) is not None:
                        found[member.name.rpartition("/")[2]] = content.read()
            records = [_records(found[name], label_bytes) for name in parts]
            train = _Images(np.concatenate([r.pixels for r in records]), np.concatenate([r.classes for r in records]))
            labels = tuple(line for line in found[names].decode().splitlines() if line.strip())
            return train, _records(found[test], label_bytes), labels
        except KeyError as exc:
            raise DataError(f"{file} lacks {folder_in}/{exc.args[0]}") from exc
        except (OSError, EOFError, tarfile.TarError, ValueError) as exc:
            raise DataError(f"{file} cannot be read: {exc}") from exc

    return read


def _records(content: bytes, label_bytes: int) -> _Images:
    records = np.frombuffer(content, np.uint8).reshape(-1, label_bytes + 3 * _CIFAR_SIDE**2)
    pixels = records[:, label_bytes:].reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE)
    return _Images(pixels, records[:, label_bytes - 1].astype(np.int64))


IMAGES: dict[str, ImagePublication] = {
    "mnist": ImagePublication(
        "MNIST",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
        _read_mnist,
    ),
    "cifar10": ImagePublication(
        "CIFAR-10",
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        _read_cifar(
            "cifar-10-binary.tar.gz",
            "cifar-10-batches-bin",
            tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
            "test_batch.bin",
            "batches.meta.txt",
            1,
        ),
    ),
    "cifar100": ImagePublication(
        "CIFAR-100",
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
        _read_cifar("cifar-100-binary.tar.gz", "cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", 2),
    ),
}

TEXTS: dict[str, Publication] = {
    "wikitext103": Publication(
        "WikiText-103",
        "https://wikitext.smerity.com/",
        {"wikitext-103-raw-v1.zip": "0ca3512bd7a238be4a63ce7b434f8935"},
    ),
}
