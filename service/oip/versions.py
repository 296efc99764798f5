"""Models and their versions, in URLs `/v2/models/{model}[/versions/{version}]...` and elsewhere.

Today the highest version of a model is served, so that is the only one that can be named.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request

from service.context import context_of
from service.errors import UnknownVersion
from service.repository import Repository, ServedModel

_PREFIXES = {"/v2/models/{model}": ("model",), "/v2/models/{model}/versions/{version}": ("model", "version")}

Handler = TypeVar("Handler", bound=Callable[..., Any])


def served_model(request: Request) -> ServedModel:
    """The model that the URL of a route registered by `for_models` names.

    Raises:
        UnknownModel: there is none of that name.
        UnknownVersion: it is not served in that version.
    """
    return version_of(context_of(request).repository, request.path_params["model"], request.path_params.get("version"))


def version_of(repository: Repository, model: str, version: str | None) -> ServedModel:
    """The model in this version; none: in the one that is served.

    Raises:
        UnknownModel: there is none of that name.
        UnknownVersion: it is not served in that version.
    """
    served = repository.get(model)
    if version is not None and version != str(served.version):
        raise UnknownVersion(
            f"version {version[:20]!r} of {served.name} is not served here: expected {served.version}",
            versions=[str(served.version)],
        )
    return served


async def _served(request: Request) -> ServedModel:
    return served_model(request)


Served = Annotated[ServedModel, Depends(_served)]


def for_models(
    router: APIRouter, method: str, suffix: str, *, openapi_extra: dict[str, Any] | None = None, **options: Any
) -> Callable[[Handler], Handler]:
    """Register a handler at `suffix` of a model's URL and of its version's."""
    extra = openapi_extra or {}

    def register(handler: Handler) -> Handler:
        for prefix, names in _PREFIXES.items():
            in_path = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
            described = {**extra, "parameters": [*in_path, *extra.get("parameters", ())]}
            router.add_api_route(prefix + suffix, handler, methods=[method], openapi_extra=described, **options)
        return handler

    return register
