"""ASGI middleware: decompresses a request's body, and stops bodies that are or become too long, or take too long to come,
before anything is parsed. What content types are read is each router's matter: `service.media`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.encodings import Inflater
from service.errors import BodyTooLarge, ClientGone, MalformedInput, RequestTimeout, ServiceError
from service.responses import error_response


class LimitBody:
    """Refuses bodies longer than `max_bytes`, as they come or decompressed, those not whole after `timeout_s`, and
    encodings that are not read."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._expected = f"expected a body of at most {max_bytes} bytes (max_body_bytes)"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        due_s = scope["state"]["arrived_s"] + self._timeout_s
        try:
            inflater = self._check(scope["headers"])
        except ServiceError as error:
            await error_response(error, scope)(scope, receive, send)
            return

        read, whole = 0, False

        async def limited_receive() -> Message:
            nonlocal read, whole
            if whole:  # what comes now is that the client goes
                return await receive()
            # The framework turns all but its own exceptions into a 400 while it reads a body.
            try:
                async with asyncio.timeout(due_s - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                detail = f"expected the whole body within {self._timeout_s:g} s, got {read} bytes"
                raise HTTPException(408, detail, RequestTimeout.headers) from None
            if message["type"] != "http.request":
                raise HTTPException(ClientGone.status, "the client closed the connection before its request was whole")
            whole = not message.get("more_body", False)
            body: bytes = message.get("body", b"")
            read += len(body)
            if read > self._max_bytes:
                raise HTTPException(413, f"{self._expected}, got more")
            if inflater is None:
                return message
            try:
                plain = inflater.feed(body)
                if whole:
                    inflater.finish()
            except ServiceError as error:
                raise HTTPException(error.status, str(error)) from error
            return {"type": "http.request", "body": plain, "more_body": not whole}

        await self._app(scope, limited_receive, send)

    def _check(self, headers: Iterable[tuple[bytes, bytes]]) -> Inflater | None:
        """What has to be done to the body, by its headers; raises what is wrong with them."""
        codings = []
        for name, value in headers:
            if name == b"content-encoding":
                codings += [coding for each in value.split(b",") if (coding := each.strip()).lower() != b"identity"]
            if name == b"content-length":
                if not value.isdigit():
                    raise MalformedInput(f"expected Content-Length to be a number, got {value[:40].decode('latin-1')!r}")
                if len(value) > 18 or int(value) > self._max_bytes:
                    raise BodyTooLarge(f"{self._expected}, got {value.decode()[:24]}")
        # Several are refused together: each layer multiplies how far a body can expand.
        return Inflater(b", ".join(codings).decode("latin-1"), self._max_bytes) if codings else None
