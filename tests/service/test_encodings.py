from __future__ import annotations

import gzip
import os
import tracemalloc
import zlib

import pytest

from service.encodings import Inflater, accepted_coding, compress
from service.errors import BodyTooLarge, MalformedInput, UnsupportedMedia

DATA = os.urandom(5000) + b"a" * 5000
COMPRESSED = {"gzip": gzip.compress(DATA), "deflate": zlib.compress(DATA), "X-GZip": gzip.compress(DATA)}


@pytest.mark.parametrize("coding", COMPRESSED)
@pytest.mark.parametrize("chunk", [1, 7, 1000, 100_000])
def test_a_body_comes_out_as_it_went_in_however_it_is_cut(coding: str, chunk: int) -> None:
    inflater = Inflater(coding, len(DATA))
    body = COMPRESSED[coding]
    assert b"".join(inflater.feed(body[start : start + chunk]) for start in range(0, len(body), chunk)) == DATA
    inflater.finish()


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_body_one_byte_over_the_limit_is_refused(coding: str) -> None:
    with pytest.raises(BodyTooLarge, match=r"at most 9999 bytes \(max_body_bytes\), got more once decompressed"):
        Inflater(coding, len(DATA) - 1).feed(COMPRESSED[coding])


def test_a_bomb_is_not_held_in_memory() -> None:
    """100 MB of zeros in 100 kB: refused after the limit, whatever more there would be."""
    stream = zlib.compressobj(wbits=31)
    bomb = b"".join([*(stream.compress(b"\0" * 1_000_000) for _ in range(100)), stream.flush()])
    tracemalloc.start()
    with pytest.raises(BodyTooLarge):
        Inflater("gzip", 400_000).feed(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_what_is_cut_short_damaged_or_goes_on_is_refused(coding: str) -> None:
    body = COMPRESSED[coding]
    inflater = Inflater(coding, 100_000)
    inflater.feed(body[:-1])
    with pytest.raises(MalformedInput, match="cut short"):
        inflater.finish()
    with pytest.raises(MalformedInput, match=f"cannot be read as {coding}"):
        Inflater(coding, 100_000).feed(body[:-4] + bytes(byte ^ 1 for byte in body[-4:]) + b"0000")
    with pytest.raises(MalformedInput, match="goes on after the end"):
        Inflater(coding, 100_000).feed(body + body)
    with pytest.raises(MalformedInput, match="cut short"):
        Inflater(coding, 100_000).finish()


def test_other_codings_are_named_in_the_refusal() -> None:
    with pytest.raises(UnsupportedMedia, match="expected Content-Encoding gzip, deflate or identity, got 'br'"):
        Inflater("br", 100)


@pytest.mark.parametrize(
    ("header", "coding"),
    [
        ("", None),
        ("identity", None),
        ("br, zstd", None),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate", "gzip"),
        ("deflate;q=0.5, gzip;q=0.4", "deflate"),
        ("gzip;q=0", None),
        ("GZIP; Q=0.5", "gzip"),
        ("gzip;q=much, deflate", "deflate"),
        ("*", None),
    ],
)
def test_the_client_chooses_the_coding_of_its_answer(header: str, coding: str | None) -> None:
    assert accepted_coding(header) == coding


def test_answers_are_what_other_readers_read() -> None:
    assert gzip.decompress(compress(DATA, "gzip")) == DATA
    assert zlib.decompress(compress(DATA, "deflate")) == DATA
