"""ASGI middleware: stamps a request's arrival and stops bodies that are too long, before anything is parsed."""

from __future__ import annotations

import time
from collections.abc import Iterable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import BodyTooLarge, MalformedInput, UnsupportedMedia
from service.responses import error_response


class LimitBody:
    """Refuses bodies longer than `max_bytes`, and content types and encodings that are not read.

    A request's `state` gets `arrived_s`, on the monotonic clock: budgets run from here.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["arrived_s"] = time.monotonic()
        try:
            self._check(scope["method"], scope["headers"])
        except (BodyTooLarge, MalformedInput, UnsupportedMedia) as error:
            await error_response(error, scope)(scope, receive, send)
            return

        read = 0

        async def limited_receive() -> Message:
            nonlocal read
            message = await receive()
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                if read > self._max_bytes:
                    # The framework turns all but its own exceptions into a 400 while it reads a body.
                    raise HTTPException(413, f"expected a body of at most {self._max_bytes} bytes, got more")
            return message

        await self._app(scope, limited_receive, send)

    def _check(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        content_type = b""
        for name, value in headers:
            if name == b"content-encoding" and value.lower() != b"identity":
                raise UnsupportedMedia(f"expected a body without Content-Encoding, got {_shown(value)}")
            if name == b"content-length":
                if not value.isdigit():
                    raise MalformedInput(f"expected Content-Length to be a number, got {_shown(value)}")
                if len(value) > 18 or int(value) > self._max_bytes:
                    raise BodyTooLarge(f"expected a body of at most {self._max_bytes} bytes, got {value.decode()[:24]}")
            if name == b"content-type":
                content_type = value
        if method == "POST" and content_type.split(b";")[0].strip().lower() != b"application/json":
            got = _shown(content_type) if content_type else "none"
            raise UnsupportedMedia(f"expected Content-Type application/json, got {got}")


def _shown(value: bytes) -> str:
    return repr(value[:40].decode("latin-1"))
