"""Who may ask, and how often: tokens checked against the keys of the file, which may change while the server runs, and
each key's rate limit. `KeyCheck` is its ASGI side; another protocol can call `Keys.check` itself."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path

from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Forbidden, RateLimited, ServiceError, Unauthorized
from service.keyring import Key, KeysError, digest_of, read_keys
from service.responses import error_response

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
"""How often the file is looked at: so long may a removed key still work."""

OPEN_PATHS = frozenset(
    {
        "/health/live",
        "/health/ready",
        "/v2/health/live",
        "/v2/health/ready",
        "/docs",
        "/docs/oauth2-redirect",
        "/redoc",
        "/openapi.json",
    }
)
"""What needs no key: probes, and the description of the interface. Whatever else there is or will be does."""


class Keys:
    """The keys of a file.

    Raises:
        KeysError: it cannot be read or is no file of keys.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seen = self._signature()
        self._keys = read_keys(file)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def check(self, token: str | None) -> Key:
        """The key of `token`, whose request is counted against its rate. From any thread.

        Raises:
            Unauthorized, RateLimited: see `known` and `count`.
        """
        key = self.known(token)
        self.count(key)
        return key

    def known(self, token: str | None) -> Key:
        """The key of `token`.

        All keys are compared, in constant time each, whichever is the one: how long it takes tells nothing.

        Raises:
            Unauthorized: there is no token, or no key has it.
        """
        if token is None:
            raise Unauthorized("expected an API key, as Authorization: Bearer KEY or as X-API-Key, got none")
        key = find_key(self._keys, digest_of(token))
        if key is None:
            raise Unauthorized("this API key is not known here")
        return key

    def count(self, key: Key) -> None:
        """Count a request against the rate of `key`.

        Raises:
            RateLimited: it has had its share of requests for now.
        """
        if key.rate is not None and not self._limiter.hit(key.rate, key.name):
            resets_s, _ = self._limiter.get_window_stats(key.rate, key.name)
            wait_s = max(1, math.ceil(resets_s - time.time()))
            raise RateLimited(f"the API key {key.name!r} may ask {key.rate}: ask again in {wait_s} s", wait_s)

    def refresh(self) -> None:
        """Read the file again if it has changed. One that is broken or gone leaves the keys as they were."""
        signature = self._signature()
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._keys = read_keys(self._file)
        except KeysError as exc:
            logger.error("the API keys stay as they were: %s", exc)  # noqa: TRY400 (the message has all there is to say)
        else:
            logger.info("%d API keys in %s", len(self._keys), self._file)

    async def watch(self) -> None:
        """Look at the file for ever."""
        while True:
            await asyncio.sleep(_LOOK_S)
            await asyncio.to_thread(self.refresh)

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            stat = self._file.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def find_key(keys: Iterable[Key], digest: bytes) -> Key | None:
    """The key with this digest. Looks at all of them, whatever it finds."""
    found = None
    for key in keys:
        if hmac.compare_digest(key.digest, digest):
            found = key
    return found


def read_token(authorization: str | None, api_key: str | None) -> str | None:
    """The token in the values of the headers `Authorization`, if it is a bearer's, and `X-API-Key`; the former counts."""
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return api_key.strip() if api_key and api_key.strip() else None


class KeyCheck:
    """ASGI middleware: no request but those to `open_paths` goes on without a key, nor is its body read. The request's
    `state` gets the `key`. The server's own requests, to warm up, need none."""

    def __init__(self, app: ASGIApp, keys: Keys, open_paths: frozenset[str]) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] == "http" and scope["path"] not in self._open_paths and "internal" not in scope["state"]:
            try:
                # Before routing, so that who has no key costs little; the access log then knows no route.
                key = scope["state"]["key"] = self._keys.known(_token(scope["headers"]))
                self._keys.count(key)
            except ServiceError as error:
                await error_response(error, scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def require_operator(request: Request) -> None:
    """A dependency of the routes that change what the server does.

    Raises:
        Forbidden: keys are needed here, and the request's is not an operator's; or it is another site's page that asks, in
            the browser of somebody who can reach the server. (Browsers say so: W3C Fetch Metadata, RFC 6454.)
    """
    headers = request.headers
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    own = site in ("same-origin", "none") if site else not origin or origin.partition("://")[2] == headers.get("host")
    if not own:
        raise Forbidden("a page of another site may not ask for this (Origin and Host differ: a proxy has to pass Host on)")
    key: Key | None = request.scope["state"].get("key")
    if key is not None:
        check_operator(key)


def check_operator(key: Key) -> None:
    """Whether this key may change what the server does.

    Raises:
        Forbidden: it may not.
    """
    if not key.admin:
        raise Forbidden(f"the API key {key.name!r} is not an operator's: expected one with admin = true")


def _token(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    found: dict[bytes, str] = {}
    for name, value in headers:
        if name in (b"authorization", b"x-api-key"):
            found.setdefault(name, value.decode("latin-1"))
    return read_token(found.get(b"authorization"), found.get(b"x-api-key"))
