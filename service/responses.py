"""Errors as responses: the one place where the error shape is made."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Scope

from service.errors import InvalidInput, MalformedInput, ServiceError

logger = logging.getLogger(__name__)

_LONGEST_MESSAGE = 500
_HTTP_CODES = {
    400: "malformed_input",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
    499: "client_gone",
}


def error_response(error: ServiceError, scope: Scope) -> JSONResponse:
    """The response of an error, counted in the app's metrics."""
    return _respond(scope, error.status, error.code, str(error), error.headers, error.details)


async def on_service_error(request: Request, exc: Exception) -> JSONResponse:
    """Our own errors."""
    assert isinstance(exc, ServiceError)
    let_go(exc)
    return error_response(exc, request.scope)


async def on_http_exception(request: Request, exc: Exception) -> JSONResponse:
    """The framework's: no such route, no such method, a body that is no text."""
    assert isinstance(exc, HTTPException)
    let_go(exc)
    code = _HTTP_CODES.get(exc.status_code, "http_error")
    message = {
        404: f"there is nothing at {request.url.path[:200]}: see /docs for what there is",
        405: f"{request.method} is not possible at {request.url.path[:200]}: expected {_allowed(exc)}",
    }.get(exc.status_code, exc.detail)
    return _respond(request.scope, exc.status_code, code, message, dict(exc.headers or {}), {})


async def on_validation_error(request: Request, exc: Exception) -> JSONResponse:
    """A body that is no JSON, or JSON that is not the request's schema."""
    assert isinstance(exc, RequestValidationError)
    let_go(exc)
    for problem in exc.errors():
        if isinstance(error := problem.get("ctx", {}).get("error"), Exception):
            let_go(error)
    first = exc.errors()[0]
    if first["type"] == "json_invalid":
        return error_response(
            MalformedInput(f"the body is no JSON: {first['ctx']['error']} at byte {first['loc'][-1]}"), request.scope
        )
    return error_response(InvalidInput(describe(first)), request.scope)


def _allowed(exc: HTTPException) -> str:
    return (exc.headers or {}).get("Allow", "another method")


def let_go(error: BaseException | None) -> None:
    """Of the calls that an error came through: those of the framework, or of what waited for a thread, keep it, and so the
    body, until garbage is collected."""
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        error = error.__context__


def describe(problem: Mapping[str, Any]) -> str:
    """One of pydantic's problems as a sentence: where, what was expected, what came."""
    parts = (str(part)[:80] for part in problem["loc"] if part != "body")
    where = ".".join(part for part in parts if not part.startswith(("constrained", "literal")))  # branches of a union
    message = problem["msg"].removeprefix("Value error, ")
    got = problem.get("input")
    shown = f", got {got!r}"[:120] if isinstance(got, (str, int, float)) else ""
    return f"{where or 'the body'}: {message}{shown}"


async def on_unknown_error(request: Request, exc: Exception) -> JSONResponse:
    """A bug: logged whole by the server, told in general."""
    logger.error("unhandled error in %s %s", request.method, request.url.path, exc_info=exc)
    return _respond(request.scope, 500, "internal", "the server met an error of its own; its log has the cause", {}, {})


def _respond(
    scope: Scope, status: int, code: str, message: str, headers: Mapping[str, str], details: dict[str, object]
) -> JSONResponse:
    scope["app"].state.metrics.refusals.labels(code).inc()
    return JSONResponse({"error": sentence(message), "code": code, **details}, status, headers)


def sentence(message: str) -> str:
    """What is told of an error. Messages quote what came: half a surrogate pair cannot be sent, a megabyte need not be."""
    message = message.encode("utf-8", "backslashreplace").decode()
    return message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + "..."
