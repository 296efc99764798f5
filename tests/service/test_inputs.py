from __future__ import annotations

import base64
import io
import struct
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from family.manifest import Manifest
from service.errors import InvalidInput
from service.inputs import Decoder
from tests.fakes import fake_manifest

MANIFEST = fake_manifest({(4,): 0.5})  # wants 2 x 2 pixels


def decode(image: Image.Image, kind: str = "PNG", **options: object) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Decoder(MANIFEST, 1_000_000).decode([{"image": base64.b64encode(file.getvalue()).decode()}])[0]


def grey(*pixels: int) -> Image.Image:
    return Image.fromarray(np.array(pixels, np.uint8).reshape(2, 2))


def test_grey_pixels_become_shares_of_white() -> None:
    np.testing.assert_allclose(decode(grey(0, 51, 102, 255)), [[0, 0.2], [0.4, 1]], atol=1e-6)


def test_colours_become_luminance() -> None:
    image = Image.new("RGB", (2, 2), (255, 0, 0))
    np.testing.assert_allclose(decode(image), 0.299, atol=0.003)


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    """Pillow clips at 255: 1000 of 65535, almost black, once became white."""
    image = Image.fromarray(np.array([[0, 1000], [32768, 65535]], np.uint16))
    np.testing.assert_allclose(decode(image), [[0, 1000 / 65535], [0.5, 1]], atol=0.002)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_black(mode: str) -> None:
    """Ink on a transparent page: the page's hidden colour does not count."""
    image = Image.new("LA", (2, 2), (255, 0))
    image.putpixel((0, 0), (255, 255))
    image.putpixel((1, 0), (255, 128))
    np.testing.assert_allclose(decode(image.convert(mode)), [[1, 0.5], [0, 0]], atol=0.01)


def test_a_palette_with_a_transparent_colour() -> None:
    image = grey(0, 255, 255, 0).convert("P")
    np.testing.assert_allclose(decode(image, transparency=255), 0, atol=0.01)


def test_cameras_that_were_held_sideways_are_believed() -> None:
    image = Image.fromarray(np.repeat(np.repeat(np.array([[255, 255], [0, 0]], np.uint8), 32, 0), 32, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees
    np.testing.assert_allclose(decode(image, "JPEG", exif=exif), [[0, 1], [0, 1]], atol=0.2)


def test_cmyk_and_larger_images() -> None:
    assert decode(Image.new("CMYK", (300, 200), (0, 0, 0, 0)), "JPEG") == pytest.approx(np.ones((2, 2)), abs=0.02)


def test_the_first_frame_of_a_moving_picture_counts() -> None:
    frames = [grey(0, 0, 0, 0), grey(255, 255, 255, 255)]
    np.testing.assert_allclose(decode(frames[0], "GIF", save_all=True, append_images=frames[1:]), 0)


def test_the_images_of_a_request_share_one_allowance() -> None:
    file = io.BytesIO()
    Image.new("1", (600, 600)).save(file, "PNG")
    row = {"image": base64.b64encode(file.getvalue()).decode()}
    Decoder(MANIFEST, 1_000_000).decode([row, row])
    with pytest.raises(
        InvalidInput, match=r"inputs\[2\].image: expected at most 1000000 pixels in all images of a request"
    ):
        Decoder(MANIFEST, 1_000_000).decode([row, row, row])


def test_a_list_of_the_wrong_length_is_not_walked() -> None:
    with pytest.raises(InvalidInput, match=r"expected numbers of shape \[2, 2\], got shape \[1000000, ...\]"):
        Decoder(MANIFEST, 1).decode([[0.5] * 1_000_000])


TOKENS = Manifest.model_validate(
    MANIFEST.model_dump() | {"image": None, "vocabulary": 300, "input": {"name": "x", "datatype": "INT64", "shape": (-1, 3)}}
)  # fmt: skip


def _tensor(values: list[int], datatype: str, code: str) -> dict[str, object]:
    return {"tensor": base64.b64encode(np.array(values, code).tobytes()).decode(), "datatype": datatype, "shape": [3]}


def test_tokens_come_as_lists_and_as_tensors() -> None:
    rows = Decoder(TOKENS, 0).decode([[0, 299, 7], _tensor([0, 299, 7], "INT64", "<i8")])
    assert rows.dtype == np.int64
    assert rows.tolist() == [[0, 299, 7]] * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0, 1, 300], "expected tokens between 0 and 299, got values from 0 to 300"),
        ([0, 1, -1], "expected tokens between 0 and 299, got values from -1 to 1"),
        ([2**64 - 1] * 3, "expected tokens between 0 and 299"),
        ([0, 1, 2**64 - 1], "expected tokens of shape"),
        ([0, 1, 2**65], "expected tokens of shape"),
        ([0, 1, 0.5], "expected tokens of shape \\[3\\], got other values among them"),
        ([True, False, True], "expected tokens of shape \\[3\\], got other values among them"),
        (_tensor([0, 1, 2], "FP32", "<f4"), "datatype: expected INT64, got 'FP32'"),
        (_tensor([0, 1, 2], "INT64", "<i4"), "expected 24 bytes for INT64 of shape"),
    ],
)
def test_what_is_no_token_is_refused(row: object, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Decoder(TOKENS, 0).decode([row])


def _two_pictures() -> bytes:
    """A segment that names two pictures in one file (CIPA DC-007): Pillow calls such a JPEG an MPO."""
    fields = [(0xB000, 7, 4, b"0100"), (0xB001, 4, 1, struct.pack("<L", 2)), (0xB002, 7, 32, struct.pack("<L", 50))]
    table = struct.pack("<H", 3) + b"".join(struct.pack("<HHL4s", *field) for field in fields) + bytes(4)
    pictures = struct.pack("<LLLHH", 0x030000, 1000, 0, 0, 0) + struct.pack("<LLLHH", 0, 1000, 0, 0, 0)
    body = b"MPF\0II*\0" + struct.pack("<L", 8) + table + pictures
    return b"\xff\xe2" + struct.pack(">H", len(body) + 2) + body


TWO_PICTURES = _two_pictures()


def test_a_jpeg_has_at_most_a_hundred_scans() -> None:
    """Bug found: a kilobyte, compressed, of thousands of them kept a processor busy for eight seconds."""
    file = io.BytesIO()
    Image.new("L", (64, 64), 128).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    start, end = content.rindex(b"\xff\xda"), content.rindex(b"\xff\xd9")
    for scans, named, refused in ((80, b"", False), (5000, b"", True), (5000, TWO_PICTURES, True)):
        bomb = content[:2] + named + content[2:end] + content[start:end] * scans + content[end:]
        decoding = pytest.raises(InvalidInput, match="a JPEG of at most 100 scans") if refused else nullcontext()
        with decoding:
            Decoder(MANIFEST, 1_000_000).decode([{"image": base64.b64encode(bomb).decode()}])


def image_of(width: int, height: int) -> dict[str, str]:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return {"image": base64.b64encode(file.getvalue()).decode()}


SMALL_LIST, SMALL_IMAGE = [[0.5, 0.5], [0.5, 0.5]], image_of(32, 32)


@pytest.mark.parametrize("inputs", [[SMALL_LIST] * 4, [SMALL_IMAGE] * 4, [image_of(64, 64)]])
def test_what_is_quick_is_decoded_at_once(inputs: list[object]) -> None:
    rows = Decoder(MANIFEST, 1_000_000).decode_if_quick(inputs)
    assert rows is not None
    np.testing.assert_array_equal(rows, Decoder(MANIFEST, 1_000_000).decode(inputs))


@pytest.mark.parametrize(
    "inputs",
    [[SMALL_LIST] * 5, [SMALL_IMAGE] * 5, [SMALL_LIST, image_of(64, 65)]],
    ids=["many rows", "many images", "many pixels"],
)
def test_what_takes_long_is_not(inputs: list[object]) -> None:
    decoder = Decoder(MANIFEST, 1_000_000)
    assert decoder.decode_if_quick(inputs) is None
    assert len(decoder.decode(inputs)) == len(inputs)


def test_a_long_file_takes_long_however_few_its_pixels() -> None:
    """Its base64 is decoded, and its chunks are read, before the size of the image is known."""
    file = io.BytesIO()
    Image.new("L", (2, 2)).save(file, "BMP")
    padded = {"image": base64.b64encode(file.getvalue() + bytes(10_000)).decode()}
    assert Decoder(MANIFEST, 1_000_000).decode_if_quick([padded]) is None
    assert len(Decoder(MANIFEST, 1_000_000).decode([padded])) == 1


def test_a_file_with_parts_that_inflate_takes_long() -> None:
    """Bug found in review: 7 KB with five texts of a megabyte each held the event loop up for 20 ms."""
    notes = PngInfo()
    notes.add_text("note", "x" * 1_000_000, zip=True)
    file = io.BytesIO()
    Image.new("L", (2, 2)).save(file, "PNG", pnginfo=notes)
    assert len(file.getvalue()) < 4000
    image = {"image": base64.b64encode(file.getvalue()).decode()}
    assert Decoder(MANIFEST, 1_000_000).decode_if_quick([image]) is None
    assert len(Decoder(MANIFEST, 1_000_000).decode([image])) == 1


def test_long_rows_take_long() -> None:
    spec = MANIFEST.input.model_copy(update={"shape": (-1, 65, 65)})
    decoder = Decoder(MANIFEST.model_copy(update={"input": spec}), 1_000_000)
    assert decoder.decode_if_quick([[[0.5] * 65] * 65]) is None


def test_what_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InvalidInput, match="str"):
        Decoder(MANIFEST, 1_000_000).decode_if_quick([SMALL_LIST, "?"])


def test_an_allowance_below_what_is_quick_holds() -> None:
    decoder = Decoder(MANIFEST, 3)
    assert decoder.decode_if_quick([image_of(2, 2)]) is None
    with pytest.raises(InvalidInput, match="at most 3 pixels"):
        decoder.decode([image_of(2, 2)])
