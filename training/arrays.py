"""NumPy archives with the arrays `x` and `y`: rows of any shape, or images as bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from family.manifest import ImageInput
from training.augmentation import augmentation
from training.data_config import ArraysConfig
from training.dataset import DataError, Dataset, DataSpec, measure_normalisation
from training.splits import Rows, load_splits


def load_arrays(config: ArraysConfig) -> Dataset:
    """Read and split `x (rows, ...)`, numbers, and `y (rows,)`, whole numbers or text.

    With `config.pixels`, `x` is `(rows, height, width)` or `(rows, height, width, 3) uint8`; rows become `(height, width)`
    or `(3, height, width)`, 0..1. Otherwise rows of one axis are standardised value by value, and others as a whole.

    Raises:
        DataError: the file cannot be read, has other arrays, or a value is not finite.
    """

    def read(file: Path) -> Rows:
        x, y = _open(file)
        return _pixels(x, file) if config.pixels else _numbers(x, file), y

    splits, labels = load_splits(read, config.file, config)
    shape = tuple(splits.train.x.shape[1:])
    image = None
    if config.pixels:
        image = ImageInput(height=shape[-2], width=shape[-1], channels=3 if len(shape) == 3 else 1)
    by_first_axis = len(shape) == 1 or (image is not None and image.channels == 3)
    spec = DataSpec(
        description=f"arrays {config.file.name}",
        input_shape=shape,
        labels=labels,
        normalisation=measure_normalisation(splits.train.x, by_first_axis=by_first_axis),
        image=image,
    )
    return Dataset(*splits, spec=spec, source=config, augment=augmentation(config, image))


def _open(file: Path) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            names = list(archive)
            arrays = {name: archive[name] for name in ("x", "y") if name in names}
    except Exception as exc:  # of zipfile, zlib, tokenize and numpy, whatever damaged bytes are to each
        raise DataError(f"{file} is no .npz file of plain arrays (numpy.savez writes one): {exc}") from exc
    if missing := sorted({"x", "y"} - arrays.keys()):
        raise DataError(f"{file} lacks {' and '.join(missing)}: expected the arrays x and y, got {', '.join(names)}")
    x, y = arrays["x"], arrays["y"]
    if x.ndim < 2 or y.shape != x.shape[:1]:
        raise DataError(
            f"{file}: expected x of (rows, ...) and y of (rows,), got shapes {list(x.shape)} and {list(y.shape)}"
        )
    if y.dtype.kind not in "iubU":
        raise DataError(f"{file}: expected y to be classes, whole numbers or text, got {y.dtype}")
    return x, y


def _pixels(x: NDArray[np.generic], file: Path) -> NDArray[np.float32]:
    if x.dtype != np.uint8 or not (x.ndim == 3 or (x.ndim == 4 and x.shape[-1] == 3)):
        raise DataError(
            f"{file}: expected x to be images, uint8 of (rows, height, width) or (rows, height, width, 3), got {x.dtype} "
            f"of {list(x.shape)}"
        )
    pixels = x.astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)) if x.ndim == 4 else pixels


def _numbers(x: NDArray[np.generic], file: Path) -> NDArray[np.float32]:
    if x.dtype.kind not in "iubf":
        raise DataError(f"{file}: expected x to be numbers, got {x.dtype}")
    with np.errstate(over="ignore"):  # becomes infinity
        numbers = x.astype(np.float32)
    if not np.isfinite(numbers).all():
        row, *index = np.argwhere(~np.isfinite(numbers))[0].tolist()
        raise DataError(f"{file}: expected finite numbers, got {x[(row, *index)]} in row {row + 1} of x, at {index}")
    return numbers
