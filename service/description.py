"""What openapi.yaml says of every operation alike: API keys, the headers of requests and responses, and errors, each
described once; and `examples.json`, an answer of the demo's model for each schema of one. The rest FastAPI makes of the
routes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from service.access import HEADER
from service.errors import ServiceError, UnknownService
from service.keys import OPEN_PATHS

_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "an API key, where the server has a file of them"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "the same, for who prefers it"},
}

_HEADERS = {
    HEADER: {"description": "the request's own if it was sane, else a new one", "schema": {"type": "string"}},
    "Retry-After": {
        "description": "seconds after which to ask again; in 503 only where that can help",
        "schema": {"type": "integer", "minimum": 1},
    },
    "WWW-Authenticate": {"description": "the scheme that is expected", "schema": {"type": "string"}},
}

_PARAMETER = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "description": "names the request in the answer, the logs and traces: up to 128 letters, digits and ._:/+=@-",
    "schema": {"type": "string"},
}

_BY_STATUS = {"401": "WWW-Authenticate", "429": "Retry-After", "503": "Retry-After"}

EXAMPLES = Path(__file__).with_name("examples.json")

_ERROR = {"$ref": "#/components/schemas/Error"}

_BY_FRAMEWORK = {
    "404": {"not_found": "There is nothing at this URL."},
    "405": {"method_not_allowed": "Nothing takes this method at this URL."},
    "500": {"internal": "A bug; the server's log has the cause."},
}
"""Codes that are no error of ours, by status: see `service.responses`."""


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """Add them to an OpenAPI document, in place."""
    errors: dict[str, Any] = {}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path not in OPEN_PATHS:
                operation["security"] = [{}, *({name: []} for name in _SCHEMES)]
            operation.setdefault("parameters", []).append({"$ref": f"#/components/parameters/{HEADER}"})
            for status, response in operation["responses"].items():
                response["headers"] = _headers(status)
                if {"schema": _ERROR} in response.get("content", {}).values():
                    response["content"] = _error_content(status)  # also where answers are plain text
                    assert errors.setdefault(status, response) == response, "a status means the same everywhere"
                    operation["responses"][status] = {"$ref": f"#/components/responses/{status}"}
    errors["405"] = {  # of no operation: it is what there is instead of one
        "description": "No such method here",
        "content": _error_content("405"),
        "headers": _headers("405") | {"Allow": {"description": "the methods that are", "schema": {"type": "string"}}},
    }
    for name, example in json.loads(EXAMPLES.read_text()).items():
        document["components"]["schemas"][name]["examples"] = [example]
    document.setdefault("components", {}).update(
        responses=dict(sorted(errors.items())),
        headers=_HEADERS,
        parameters={HEADER: _PARAMETER},
        securitySchemes=_SCHEMES,
    )
    return document


def _headers(status: str) -> dict[str, Any]:
    names = (HEADER, *([_BY_STATUS[status]] if status in _BY_STATUS else []))
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _error_content(status: str) -> dict[str, Any]:
    """The body of an error, with an example for each code that this status can have."""
    ours = [each for each in _all_errors() if str(each.status) == status and each is not UnknownService]  # gRPC's alone
    codes = {each.code: " ".join((each.__doc__ or "").split()) for each in ours} | _BY_FRAMEWORK.get(status, {})
    examples = {code: {"value": {"error": about, "code": code}} for code, about in sorted(codes.items())}
    return {"application/json": {"schema": _ERROR, "examples": examples}}


def _all_errors(kind: type[ServiceError] = ServiceError) -> list[type[ServiceError]]:
    return [each for child in kind.__subclasses__() for each in (child, *_all_errors(child))]
