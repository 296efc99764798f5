"""Content codings (RFC 9110, section 8.4.1): bodies are read within a bound, answers written as clients take them."""

from __future__ import annotations

import zlib

from service.errors import BodyTooLarge, MalformedInput, UnsupportedMedia

_WBITS = {"gzip": 31, "deflate": 15}  # HTTP's deflate is the zlib format
_QUICKEST = 1


class Inflater:
    """Decompresses a body chunk by chunk. However far it expands, no more than `max_bytes` of it are ever held.

    Raises:
        UnsupportedMedia: `coding` is not one that is read.
    """

    def __init__(self, coding: str, max_bytes: int) -> None:
        coding = coding.strip().lower().removeprefix("x-")
        if coding not in _WBITS:
            raise UnsupportedMedia(f"expected Content-Encoding gzip, deflate or identity, got {coding[:40]!r}")
        self._coding = coding
        self._max_bytes = max_bytes
        self._length = 0
        self._stream = zlib.decompressobj(_WBITS[coding])

    def feed(self, data: bytes) -> bytes:
        """What `data` adds to the body.

        Raises:
            BodyTooLarge: the body is longer than `max_bytes`.
            MalformedInput: it is not compressed like this, or goes on after its end.
        """
        if not data:
            return b""
        try:
            # A limit of 0 would mean none, so one byte too many may come.
            plain = self._stream.decompress(data, self._max_bytes - self._length + 1)
        except zlib.error as exc:
            raise MalformedInput(f"the body cannot be read as {self._coding}: {exc}") from exc
        self._length += len(plain)
        if self._length > self._max_bytes:
            most = f"{self._max_bytes} bytes (max_body_bytes)"
            raise BodyTooLarge(f"expected a body of at most {most}, got more once decompressed")
        if self._stream.unused_data:
            raise MalformedInput(f"the body goes on after the end of its {self._coding} stream")
        return plain

    def finish(self) -> None:
        """Raises `MalformedInput` if the stream has not come to its end."""
        if not self._stream.eof:
            raise MalformedInput(f"the {self._coding} stream of the body is cut short")


def accepted_coding(accept_encoding: str) -> str | None:
    """The coding that an `Accept-Encoding` header likes best of those that we write; none: send it as it is."""
    best, best_weight = None, 0.0
    for entry in accept_encoding.lower().split(","):
        coding, _, parameter = entry.partition(";")
        coding = coding.strip().removeprefix("x-")
        try:
            weight = float(parameter.strip().removeprefix("q=") or 1)
        except ValueError:
            continue
        if coding in _WBITS and weight > best_weight:
            best, best_weight = coding, weight
    return best


def compress(body: bytes, coding: str) -> bytes:
    """`body` in a coding that `accepted_coding` gave: quickly rather than small, since answers are awaited."""
    return zlib.compress(body, _QUICKEST, _WBITS[coding])
