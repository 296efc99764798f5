"""What clients send as one row -> `x (rows, *input_shape)`, float32 or tokens, checked before it can reach the queue."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from family.manifest import ImageInput, Manifest
from family.pixels import IMAGE_FORMATS, pixels_of
from service.errors import InvalidInput, MalformedInput
from service.runtime import Rows

_SCAN, _MOST_SCANS = b"\xff\xda", 100
"""Marks a scan of a JPEG (ITU-T T.81, B.1.1.3). Progressive ones have about ten; each is a walk over all the image, so that
thousands of them keep a processor busy for minutes."""

_QUICK_ROWS, _QUICK_VALUES, _QUICK_TEXT = 4, 4096, 8192
"""What is decoded in about the time that the rest of its request takes: so many rows, of so many values each; and, of
images, so many pixels in all, and so many characters of base64 each."""

_INFLATED = (b"zTXt", b"iTXt", b"iCCP")
"""Chunks of a PNG that can become a thousand times as long (ISO/IEC 15948, 11.3)."""


class _TakesLong(Exception):
    """An image might take longer than is known before."""


class _TooManyPixels(Exception):
    """More than the images of a request may have."""


class Decoder:
    """Decodes the rows of one request; its images share one allowance of pixels.

    Raises:
        MalformedInput: base64 or an image cannot be parsed.
        InvalidInput: another shape, type or range than the model wants, NaN or infinity, too many pixels.
    """

    def __init__(self, manifest: Manifest, max_image_pixels: int) -> None:
        self._manifest, self._image = manifest, manifest.image
        self._datatype, self._dtype = manifest.input.datatype, np.dtype(manifest.input.code)
        self._shape = manifest.input.shape[1:]
        self._max_pixels = self._pixels_left = max_image_pixels
        self._quick = False

    def decode(self, inputs: Sequence[Any]) -> Rows:
        """All `inputs` as `(rows, *input_shape)`."""
        try:
            return self._decode(inputs, self._max_pixels)
        except _TooManyPixels as exc:
            raise InvalidInput(str(exc)) from exc

    def decode_if_quick(self, inputs: Sequence[Any]) -> Rows | None:
        """The same; None if that takes too long for the event loop, as many rows do, long ones, and larger images."""
        if len(inputs) > _QUICK_ROWS or math.prod(self._shape) > _QUICK_VALUES:
            return None
        images = [row["image"] for row in inputs if isinstance(row, dict) and "image" in row]
        if any(isinstance(text, str) and len(text) > _QUICK_TEXT for text in images):
            return None
        try:
            return self._decode(inputs, min(_QUICK_VALUES, self._max_pixels), quick=True)
        except (_TakesLong, _TooManyPixels):
            return None

    def _decode(self, inputs: Sequence[Any], max_pixels: int, *, quick: bool = False) -> Rows:
        self._pixels_left, self._quick = max_pixels, quick
        rows = np.stack([self._row(row, f"inputs[{index}]") for index, row in enumerate(inputs)])
        check_rows(rows, "inputs", self._manifest)
        return rows

    def _row(self, row: Any, where: str) -> Rows:
        shape = list(self._shape)
        match row:
            case list():
                return self._from_list(row, where)
            case {"image": text, **rest} if not rest:
                if self._image is None:
                    raise InvalidInput(f"{where}: this model does not take images, but arrays of shape {shape}")
                return self._from_image(_base64(text, f"{where}.image"), f"{where}.image", self._image)
            case {"tensor": text, "datatype": datatype, "shape": got_shape, **rest} if not rest:
                return self._from_tensor(text, datatype, got_shape, where)
        got = f"an object with {sorted(map(str, row))}" if isinstance(row, dict) else type(row).__name__
        raise InvalidInput(
            f'{where}: expected a nested list of shape {shape}, {{"image": base64}} or '
            f'{{"tensor": base64, "datatype": "{self._datatype}", "shape": {shape}}}, got {got[:200]}'
        )

    def _from_list(self, row: list[Any], where: str) -> Rows:
        tokens = self._dtype.kind == "i"
        expected = f"{where}: expected {'tokens' if tokens else 'numbers'} of shape {list(self._shape)}"
        if len(row) != self._shape[0]:  # before numpy walks whatever it is
            raise InvalidInput(f"{expected}, got shape [{len(row)}, ...]")
        try:
            values = np.array(row)
        except (ValueError, OverflowError) as exc:
            raise InvalidInput(f"{expected}, got lists of uneven lengths") from exc
        if values.shape != self._shape:
            raise InvalidInput(f"{expected}, got shape {list(values.shape)}")
        if values.dtype.kind not in ("iu" if tokens else "fiu"):
            raise InvalidInput(f"{expected}, got other values among them")
        with np.errstate(over="ignore"):  # becomes infinity, or a negative token: refused for all forms alike
            return values.astype(self._dtype)

    def _from_tensor(self, text: Any, datatype: Any, shape: Any, where: str) -> Rows:
        if datatype != self._datatype:
            raise InvalidInput(f"{where}.datatype: expected {self._datatype}, got {str(datatype)[:40]!r}")
        if shape != list(self._shape):
            raise InvalidInput(f"{where}.shape: expected {list(self._shape)}, got {str(shape)[:80]!r}")
        data = _base64(text, f"{where}.tensor")
        expected = self._dtype.itemsize * int(np.prod(self._shape))
        if len(data) != expected:
            wanted = f"{expected} bytes for {self._datatype} of shape {list(self._shape)}"
            raise InvalidInput(f"{where}.tensor: expected {wanted}, got {len(data)}")
        return np.frombuffer(data, self._dtype).reshape(self._shape)

    def _from_image(self, data: bytes, where: str, wanted: ImageInput) -> Rows:
        """As `family.pixels.pixels_of`. The size in the header is checked before any pixel is decoded."""
        too_many = f"{where}: expected at most {self._max_pixels} pixels in all images of a request (max_image_pixels)"
        if self._quick and any(chunk in data for chunk in _INFLATED):
            raise _TakesLong
        try:
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                self._pixels_left -= image.width * image.height
                if self._pixels_left < 0:
                    raise _TooManyPixels(f"{too_many}, got {image.width} x {image.height} here")
                if image.format in ("JPEG", "MPO") and data.count(_SCAN) > _MOST_SCANS:
                    raise InvalidInput(f"{where}: expected a JPEG of at most {_MOST_SCANS} scans, got more")
                return pixels_of(image, wanted)
        except UnidentifiedImageError as exc:
            got = f"{len(data)} bytes of something else"
            raise MalformedInput(f"{where}: expected a PNG, JPEG, WebP, BMP or GIF file, got {got}") from exc
        except Image.DecompressionBombError as exc:
            raise InvalidInput(f"{too_many}, got far more") from exc
        except (OSError, SyntaxError, ValueError, EOFError) as exc:  # Pillow's words for a damaged file
            raise MalformedInput(f"{where}: the image is damaged: {exc}") from exc


def check_rows(rows: Rows, name: str, manifest: Manifest) -> None:
    """Check the values of `rows (rows, *input_shape)`, at least one; messages call them `name`.

    Raises:
        InvalidInput: NaN or infinity among them, pixels out of range, or tokens that the model does not have.
    """
    low, high = float(rows.min()), float(rows.max())  # NaN and infinity come through
    if manifest.vocabulary is not None and (low < 0 or high >= manifest.vocabulary):
        raise InvalidInput(
            f"{name}: expected tokens between 0 and {manifest.vocabulary - 1}, got values from {low:g} to {high:g}"
        )
    if not (math.isfinite(low) and math.isfinite(high)):
        index = int(np.argwhere(~np.isfinite(rows))[0][0])
        raise InvalidInput(f"{name}[{index}]: expected finite numbers, got NaN or infinity")
    if manifest.image is not None and (low < 0 or high > 1):
        raise InvalidInput(f"{name}: expected pixels between 0 (black) and 1 (white), got values from {low:g} to {high:g}")


def _base64(text: Any, where: str) -> bytes:
    if not isinstance(text, str):
        raise InvalidInput(f"{where}: expected a base64 string, got {type(text).__name__}")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise MalformedInput(f"{where}: expected base64: {exc}") from exc
