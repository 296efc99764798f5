"""What clients send as one row -> `x (rows, *input_shape) float32`, checked before it can reach the queue."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from family.manifest import ImageInput, Manifest
from service.errors import InvalidInput, MalformedInput
from service.runtime import Rows

_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


def decode_rows(inputs: Sequence[Any], manifest: Manifest, max_image_pixels: int) -> Rows:
    """Decode the `inputs` of a request.

    Raises:
        MalformedInput: base64 or an image cannot be parsed.
        InvalidInput: another shape, type or range than the model wants, NaN or infinity.
    """
    rows = np.stack([_decode(row, index, manifest, max_image_pixels) for index, row in enumerate(inputs)])
    if not np.isfinite(rows).all():
        index = int(np.argwhere(~np.isfinite(rows))[0][0])
        raise InvalidInput(f"inputs[{index}]: expected finite numbers, got NaN or infinity")
    if manifest.image is not None and (rows.min() < 0 or rows.max() > 1):
        raise InvalidInput(
            f"inputs: expected pixels between 0 (black) and 1 (white), got values from {rows.min():g} to {rows.max():g}"
        )
    return rows


def has_images(inputs: Sequence[Any]) -> bool:
    """Whether decoding takes long enough to be kept off the event loop."""
    return any(isinstance(row, dict) and "image" in row for row in inputs)


def _decode(row: Any, index: int, manifest: Manifest, max_image_pixels: int) -> Rows:
    where, shape = f"inputs[{index}]", manifest.input.shape[1:]
    if isinstance(row, list):
        return _from_list(row, where, shape)
    if isinstance(row, dict) and row.keys() == {"image"}:
        if manifest.image is None:
            raise InvalidInput(f"{where}: this model does not take images, but arrays of shape {list(shape)}")
        return _from_image(_base64(row["image"], f"{where}.image"), f"{where}.image", manifest.image, max_image_pixels)
    if isinstance(row, dict) and row.keys() == {"tensor", "datatype", "shape"}:
        return _from_tensor(row, where, shape)
    got = f"an object with {sorted(map(str, row))}" if isinstance(row, dict) else type(row).__name__
    raise InvalidInput(
        f'{where}: expected a nested list of shape {list(shape)}, {{"image": base64}} or '
        f'{{"tensor": base64, "datatype": "FP32", "shape": {list(shape)}}}, got {got[:200]}'
    )


def _from_list(row: list[Any], where: str, shape: tuple[int, ...]) -> Rows:
    try:
        values = np.array(row)
    except (ValueError, OverflowError) as exc:
        raise InvalidInput(f"{where}: expected numbers of shape {list(shape)}, got lists of uneven lengths") from exc
    if values.shape != shape:
        raise InvalidInput(f"{where}: expected numbers of shape {list(shape)}, got shape {list(values.shape)}")
    if values.dtype.kind not in "fiu":
        raise InvalidInput(f"{where}: expected numbers, got other values among them")
    with np.errstate(over="ignore"):  # becomes infinity, which is refused for all forms alike
        return values.astype(np.float32)


def _from_tensor(row: dict[str, Any], where: str, shape: tuple[int, ...]) -> Rows:
    if row["datatype"] != "FP32":
        raise InvalidInput(f"{where}.datatype: expected FP32, got {str(row['datatype'])[:40]!r}")
    if row["shape"] != list(shape):
        raise InvalidInput(f"{where}.shape: expected {list(shape)}, got {str(row['shape'])[:80]}")
    data = _base64(row["tensor"], f"{where}.tensor")
    expected = 4 * int(np.prod(shape))
    if len(data) != expected:
        raise InvalidInput(f"{where}.tensor: expected {expected} bytes for FP32 of shape {list(shape)}, got {len(data)}")
    values: NDArray[np.float32] = np.frombuffer(data, "<f4").reshape(shape).astype(np.float32)
    return values


def _from_image(data: bytes, where: str, wanted: ImageInput, max_pixels: int) -> Rows:
    """Grey, resized, 0..1. The size in the header is checked before any pixel is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise InvalidInput(f"{where}: expected at most {max_pixels} pixels, got {image.width} x {image.height}")
            grey = image.convert("L").resize((wanted.width, wanted.height), Image.Resampling.BILINEAR)
    except UnidentifiedImageError as exc:
        raise MalformedInput(
            f"{where}: expected a PNG, JPEG, WebP, BMP or GIF file, got {len(data)} bytes of something else"
        ) from exc
    except Image.DecompressionBombError as exc:
        raise InvalidInput(f"{where}: expected at most {max_pixels} pixels, got far more") from exc
    except (OSError, SyntaxError, ValueError, EOFError) as exc:  # Pillow's words for a damaged file
        raise MalformedInput(f"{where}: the image is damaged: {exc}") from exc
    return np.asarray(grey, np.float32) / np.float32(255)


def _base64(text: Any, where: str) -> bytes:
    if not isinstance(text, str):
        raise InvalidInput(f"{where}: expected a base64 string, got {type(text).__name__}")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise MalformedInput(f"{where}: expected base64: {exc}") from exc
