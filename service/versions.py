"""Models in URLs, with and without a version: `.../models/{model}[/versions/{version}]...`, in `/v1` as in `/v2`.

Without one the highest version that is served answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Request

from service.context import context_of
from service.repository import ServedModel

_URLS = {"/models/{model}": ("model",), "/models/{model}/versions/{version}": ("model", "version")}

Handler = TypeVar("Handler", bound=Callable[..., Any])


def model_urls(api: Literal["/v1", "/v2"]) -> list[str]:
    """How a model and its version are named there."""
    return [api + url for url in _URLS]


def served_model(request: Request) -> ServedModel:
    """The model that the URL of a route under `model_urls` names.

    Raises:
        UnknownModel: there is none of that name.
        UnknownVersion: it is not served in that version.
    """
    named = request.path_params
    return context_of(request).repository.get(named["model"], named.get("version"))


async def _served(request: Request) -> ServedModel:
    return served_model(request)


Served = Annotated[ServedModel, Depends(_served)]


def for_models(
    router: APIRouter,
    api: Literal["/v1", "/v2"],
    method: str,
    suffix: str,
    *,
    openapi_extra: dict[str, Any] | None = None,
    **options: Any,
) -> Callable[[Handler], Handler]:
    """Register a handler at `suffix` of a model's URL and of its version's."""
    extra = openapi_extra or {}

    def register(handler: Handler) -> Handler:
        for url, names in _URLS.items():
            in_path = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
            described = {**extra, "parameters": [*in_path, *extra.get("parameters", ())]}
            router.add_api_route(api + url + suffix, handler, methods=[method], openapi_extra=described, **options)
        return handler

    return register
