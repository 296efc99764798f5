"""How an image becomes a row of a model's input: the same code where a family is trained and where it is served.

Knows Pillow and NumPy, and neither where an image comes from nor how large it may be: who opens it checks that first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from family.manifest import ImageInput

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""What is opened, by content; Pillow's rarer decoders are left out."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation; 1 is upright already."""


def pixels_of(image: Image.Image, wanted: ImageInput) -> NDArray[np.float32]:
    """Upright, on black, grey or of three colours, resized, 0..1: `(*wanted.row_shape) float32`.

    Raises:
        OSError, SyntaxError, ValueError, EOFError: the image is damaged (Pillow's words for it).
    """
    mode = "L" if wanted.channels == 1 else "RGB"
    plain = _flattened(_upright(image), mode)
    resized = plain.resize((wanted.width, wanted.height), Image.Resampling.BILINEAR)
    pixels = np.asarray(resized, np.float32) / np.float32(255)
    return pixels if wanted.channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; as it is where that cannot be read.

    `ImageOps.exif_transpose` writes the rest of the EXIF anew, which fails where any other tag is damaged.
    """
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 (Pillow's parser has no error of its own, but whatever bytes bring)
        return image
    return image if turn is None else image.transpose(turn)


def _flattened(image: Image.Image, mode: str) -> Image.Image:
    """As 8 bits a channel: 16-bit values scaled, what is transparent black."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        grey = (np.asarray(image, np.float32) / 257).round().clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert(mode)
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", opaque.size, "black"), opaque).convert(mode)
    return image.convert(mode)
