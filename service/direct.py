"""Routes that do without FastAPI: its matching, dependencies and responses take as long as all else together.

FastAPI describes them, by routes of its own at the same URLs, which also take whatever these leave to them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ServiceError
from service.media import is_read
from service.responses import on_http_exception, on_service_error


class DirectRoute(Route):
    """Takes POSTs with bodies of these types, or with `unnamed` without a Content-Type, to `endpoint`."""

    def __init__(
        self, url: str, endpoint: Callable[[Request], Awaitable[Response]], *media_types: str, unnamed: bool = False
    ) -> None:
        super().__init__(url, endpoint, methods=["POST"], include_in_schema=False)
        self._media_types = media_types
        self._unnamed = unnamed

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """See Starlette."""
        match, child_scope = super().matches(scope)
        if match is not Match.FULL:
            return Match.NONE, {}
        content_type = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"content-type"), None)
        if not is_read(content_type, self._media_types, unnamed=self._unnamed):
            return Match.NONE, {}
        return match, {**child_scope, "route": self}  # as FastAPI's routes do, for traces and the access log


class DirectRoutes:
    """ASGI middleware, the innermost: what one of `routes` takes never gets to the app."""

    def __init__(self, app: ASGIApp, routes: Sequence[DirectRoute]) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] == "http" and scope["method"] == "POST":
            for route in self._routes:
                match, child_scope = route.matches(scope)
                if match is Match.FULL:
                    scope.update(child_scope)
                    response = await _answer(Request(scope, receive), child_scope["endpoint"])
                    await response(scope, receive, send)
                    return
        await self._app(scope, receive, send)


async def _answer(request: Request, endpoint: Callable[[Request], Awaitable[Response]]) -> Response:
    try:
        return await endpoint(request)
    except ServiceError as error:
        return await on_service_error(request, error)
    except HTTPException as exc:  # of the body, while it is read
        return await on_http_exception(request, exc)
