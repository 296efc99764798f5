from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from family.manifest import ImageInput
from family.pixels import pixels_of

WANTED = ImageInput(height=8, width=6, channels=3)


def photograph(orientation: int, kind: str = "JPEG") -> bytes:
    """Noise of 16 x 12 pixels, as a camera writes it: how it was held, and by whom it was made."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "maker"
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8)).save(file, kind, exif=exif)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return pixels_of(image, WANTED)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright(orientation: int, kind: str) -> None:
    data = photograph(orientation, kind)
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
    np.testing.assert_array_equal(pixels(data), pixels_of(upright, WANTED))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_damaged_description_does_not_make_a_damaged_image() -> None:
    """Bug found: a byte of the EXIF that Pillow cannot write again was struct.error or TypeError, 500 in the server."""
    data = photograph(6)
    first, whole = data.index(b"Exif"), pixels(data)
    for place in range(first + 10, first + 48):  # of the tags; the image itself is whole
        for value in (0, 2, 26, 84, 255):
            assert pixels(data[:place] + bytes([value]) + data[place + 1 :]).shape == whole.shape
    np.testing.assert_array_equal(pixels(data[: first + 17] + b"\0" + data[first + 18 :]), whole)  # the maker's type
