"""Routes that do without FastAPI: its matching, dependencies and responses take as long as all else together.

FastAPI describes them, by routes of its own at the same URLs, which also take whatever these leave to them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ServiceError
from service.media import is_read
from service.responses import on_http_exception, on_service_error

Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]


class DirectRoute:
    """Takes POSTs with bodies of these types, or with `unnamed` without a Content-Type, to `endpoint`. `path` is the
    template of its URLs, under the name that FastAPI's routes have for it: traces and the access log tell it."""

    def __init__(self, path: str, endpoint: Endpoint, *media_types: str, unnamed: bool = False) -> None:
        self.path = path
        self.endpoint = endpoint
        self._route = Route(path, endpoint, methods=["POST"])
        self._media_types = media_types
        self._unnamed = unnamed

    def takes(self, scope: Scope) -> bool:
        """Whether the request of `scope` is one of its own; then the scope gets what Starlette's router would add."""
        match, found = self._route.matches(scope)
        if match is not Match.FULL:
            return False
        content_type = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"content-type"), None)
        if not is_read(content_type, self._media_types, unnamed=self._unnamed):
            return False
        scope.update(found, route=self)
        return True


class DirectRoutes:
    """ASGI middleware, the innermost: what one of `routes` takes never gets to the app."""

    def __init__(self, app: ASGIApp, routes: Sequence[DirectRoute]) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        for route in self._routes:
            if route.takes(scope):
                response = await _answer(Request(scope, receive), route.endpoint)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _answer(request: Request, endpoint: Endpoint) -> Response:
    try:
        return await endpoint(request)
    except ServiceError as error:
        return await on_service_error(request, error)
    except HTTPException as exc:  # of the body, while it is read
        return await on_http_exception(request, exc)
