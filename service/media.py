"""Which content types a router's requests may have: said where its routes are, checked before a body is read."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from service.errors import UnsupportedMedia

JSON = "application/json"
OCTETS = "application/octet-stream"

RAW_BODY: dict[str, Any] = {
    "content": {
        OCTETS: {
            "schema": {
                "type": "string",
                "format": "binary",
                "description": "rows after one another, each little-endian row-major FP32 of the model's input shape; the "
                "wishes are query parameters then, named as in the JSON body",
            }
        }
    }
}
"""For the description of the route that shares the path."""


def reading(*media_types: str, unnamed: bool = False) -> type[APIRoute]:
    """A route class whose POSTs take bodies of these types and, with `unnamed`, bodies without a Content-Type.

    Forms are left out on purpose: a browser sends them across origins without asking.
    """

    class Reading(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            if "POST" not in (self.methods or ()):
                return handle

            async def checked(request: Request) -> Response:
                content_type = request.headers.get("content-type")
                if not is_read(content_type, media_types, unnamed=unnamed):
                    got = repr(content_type[:40]) if content_type else "none"
                    raise UnsupportedMedia(f"expected Content-Type {' or '.join(media_types)}, got {got}")
                return await handle(request)

            return checked

    return Reading


def is_read(content_type: str | None, media_types: tuple[str, ...], *, unnamed: bool) -> bool:
    """Whether bodies with this header are of one of these types."""
    return content_type.partition(";")[0].strip().lower() in media_types if content_type else unnamed
