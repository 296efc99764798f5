"""Folders of images, one subfolder for each class."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from family.manifest import ImageInput
from family.pixels import IMAGE_FORMATS, pixels_of
from training.augmentation import augmentation
from training.data_config import ImagesConfig
from training.dataset import DataError, Dataset, DataSpec, measure_normalisation
from training.splits import Rows, load_splits

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def load_images(config: ImagesConfig) -> Dataset:
    """Read, resize and split the images of a folder; all are kept in memory, as 4 bytes a value.

    Raises:
        DataError: the folder has no images in subfolders, or a file cannot be read or is too large; the message names it.
    """
    image = ImageInput(height=config.height, width=config.width, channels=config.channels)

    left_out: Counter[str] = Counter()

    def read(folder: Path) -> Rows:
        files, others = _files(folder)
        left_out.update(others)
        x = np.empty((len(files), *image.row_shape), np.float32)
        for row, file in enumerate(files):
            x[row] = _read(file, image, config.max_pixels)
        return x, np.array([file.parent.name for file in files])

    splits, labels = load_splits(read, config.folder, config)
    spec = DataSpec(
        description=f"images {config.folder.resolve().name}, {config.height} x {config.width}",
        input_shape=image.row_shape,
        labels=labels,
        normalisation=measure_normalisation(splits.train.x, by_first_axis=image.channels == 3),
        image=image,
    )
    augment = augmentation(config, image)
    return Dataset(*splits, spec=spec, source=config, augment=augment, left_out=_told(left_out))


def _files(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The images of all classes, in an order that no file system decides, and how many of what else there is."""
    try:
        visible = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
        classes = [child for child in visible if child.is_dir()]
        found = [file for each in classes for file in sorted(each.iterdir()) if not file.name.startswith(".")]
        files = [file for file in found if file.suffix.lower() in _SUFFIXES and not file.is_dir()]
        others = Counter(map(_kind, {*visible, *found} - {*classes, *files}))
    except OSError as exc:
        raise DataError(f"cannot read the folder {folder}: {exc.strerror}") from exc
    if empty := [each.name for each in classes if not any(file.parent == each for file in files)]:
        raise DataError(f"{folder}: no {', '.join(_SUFFIXES)} file in {', '.join(empty)}")
    if not classes:
        raise DataError(f"{folder}: expected one subfolder of images for each class, got none")
    return files, others


def _kind(file: Path) -> str:
    if file.is_dir():
        return "folders in folders of classes"
    return f"{file.suffix.lower()} files" if file.suffix else "files without a suffix"


def _told(left_out: Counter[str]) -> str | None:
    if not left_out:
        return None
    what = ", ".join(f"{count:,} {kind}" for kind, count in sorted(left_out.items()))
    return f"{what}: images are CLASS/NAME in the folder, with the suffixes {', '.join(_SUFFIXES)}"


def _read(file: Path, wanted: ImageInput, max_pixels: int) -> NDArray[np.float32]:
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > max_pixels:
                got = f"{image.width} x {image.height}"
                raise DataError(
                    f"{file}: expected at most {max_pixels} pixels, got {got}; data.max_pixels raises the limit"
                )
            return pixels_of(image, wanted)
    except UnidentifiedImageError as exc:
        raise DataError(f"{file} is no PNG, JPEG, WebP, BMP or GIF file: remove it, or mend it") from exc
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as exc:
        if isinstance(exc, DataError):
            raise
        raise DataError(f"{file} is damaged: {exc}") from exc
