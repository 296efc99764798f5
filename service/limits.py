"""ASGI middleware: stamps a request's arrival and stops bodies that are too long, before anything is parsed."""

from __future__ import annotations

import time

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import BodyTooLarge, MalformedInput, UnsupportedMedia
from service.responses import error_response


class LimitBody:
    """Refuses bodies longer than `max_bytes` and encodings that are not read.

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
        headers = dict(scope["headers"])
        try:
            self._check_headers(headers)
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

    def _check_headers(self, headers: dict[bytes, bytes]) -> None:
        encoding = headers.get(b"content-encoding", b"identity").decode("latin-1")
        if encoding.lower() != "identity":
            raise UnsupportedMedia(f"expected a body without Content-Encoding, got {encoding[:40]!r}")
        length = headers.get(b"content-length")
        if length is None:
            return
        if not length.isdigit():
            raise MalformedInput("expected Content-Length to be a number")
        if len(length) > 18 or int(length) > self._max_bytes:
            raise BodyTooLarge(f"expected a body of at most {self._max_bytes} bytes, got {length.decode()[:24]}")
