"""JSON bodies as the schemas that they should be, where FastAPI does not read them."""

from __future__ import annotations

import codecs
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from service.errors import InvalidInput, MalformedInput, ServiceError
from service.responses import describe

M = TypeVar("M", bound=BaseModel)


def parse(schema: type[M], body: bytes, otherwise: type[ServiceError] = InvalidInput) -> M:
    """A body as `schema`.

    Raises:
        MalformedInput: it is no JSON.
        InvalidInput: it is JSON that `schema` does not allow; this is `otherwise`.
    """
    try:
        return schema.model_validate_json(body.removeprefix(codecs.BOM_UTF8))  # which .NET writes
    except ValidationError as exc:
        raise _refusal(exc, otherwise) from exc


def _refusal(exc: ValidationError, otherwise: type[ServiceError]) -> ServiceError:
    """What is told of an error of pydantic's. Apart from who raises it: the call and the error would keep each other until
    garbage is collected."""
    first = exc.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return MalformedInput(f"the body is no JSON: {first['ctx']['error']}")
    return otherwise(describe(first))
