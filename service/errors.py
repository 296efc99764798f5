"""All errors that a client can meet, with their HTTP status and stable code.

    ServiceError
    +-- MalformedInput      400  what cannot be parsed
    +-- MalformedRequest    400  what is no HTTP
    +-- BadRequest          400  what the Open Inference Protocol does not allow; its 400 is often /v1's 422
    +-- Unauthorized        401  no API key, or an unknown one
    +-- Forbidden           403  an API key that may not do this
    +-- InvalidInput        422  what is well-formed and not valid
    |   +-- NotOffered      422  a depth or path that the model does not offer
    +-- UnknownModel        404
    +-- UnknownVersion      404
    +-- UnknownService      404  a gRPC service, of which somebody asks how it is
    +-- RequestTimeout      408  headers or a body that come too slowly
    +-- BodyTooLarge        413
    +-- UnsupportedMedia    415
    +-- QueueFull           429
    +-- RateLimited         429  an API key that has had its share
    +-- HeadersTooLarge     431
    +-- ClientGone          499  nobody reads it; it is for metrics and logs
    +-- InferenceFailed     500
    +-- NotSupported        501  a part of a protocol that is not served
    +-- NotReady            503
    +-- TooManyConnections  503
    +-- DeadlineExpired     504
    +-- DeadlineInfeasible  504

Every response that is not a success has the one shape `{"error": "<sentence>", "code": "<stable_code>", ...}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class ServiceError(Exception):
    """An answer that is an error. `details` become members of the JSON object beside `error` and `code`."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    headers: Mapping[str, str] = {}

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.details = details


class MalformedInput(ServiceError):
    """The body, a base64 string or an image cannot be parsed."""

    status = 400
    code = "malformed_input"


class MalformedRequest(ServiceError):
    """What came is no HTTP/1.1 that the server reads."""

    status = 400
    code = "malformed_request"


class BadRequest(ServiceError):
    """A /v2 request with other tensors, outputs or parameters than the model and the protocol have."""

    status = 400
    code = "bad_request"


class Unauthorized(ServiceError):
    """The request has no API key, or one that is not known."""

    status = 401
    code = "unauthorized"
    headers: Mapping[str, str] = {"WWW-Authenticate": 'Bearer realm="hbll"'}


class Forbidden(ServiceError):
    """The API key is known, and may not do this: another 401 would ask for what was given."""

    status = 403
    code = "forbidden"


class InvalidInput(ServiceError):
    """A wrong shape, a value out of range, wishes that exclude each other."""

    status = 422
    code = "invalid_input"


class NotOffered(InvalidInput):
    """A depth or path that the model does not offer; `details` list what it does."""

    code = "not_offered"


class UnknownModel(ServiceError):
    """No model of that name is served."""

    status = 404
    code = "unknown_model"


class UnknownVersion(ServiceError):
    """The model is served, and not in this version."""

    status = 404
    code = "unknown_version"


class UnknownService(ServiceError):
    """No gRPC service of that name is served."""

    status = 404
    code = "unknown_service"


class RequestTimeout(ServiceError):
    """The headers or the body, or by gRPC the message, did not arrive in time. HTTP's connection ends: the rest of the
    request may still come."""

    status = 408
    code = "request_timeout"
    headers: Mapping[str, str] = {"Connection": "close"}


class BodyTooLarge(ServiceError):
    """The body is longer than the server reads."""

    status = 413
    code = "body_too_large"


class UnsupportedMedia(ServiceError):
    """A content type or content encoding that the server does not read."""

    status = 415
    code = "unsupported_media_type"


class QueueFull(ServiceError):
    """Too many rows are waiting already."""

    status = 429
    code = "queue_full"
    headers: Mapping[str, str] = {"Retry-After": "1"}


class RateLimited(ServiceError):
    """The API key has had its share of requests for now, however idle the server is."""

    status = 429
    code = "rate_limited"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.headers = {"Retry-After": str(retry_after_s)}


class HeadersTooLarge(ServiceError):
    """The URL and headers are longer than the server reads."""

    status = 431
    code = "headers_too_large"
    headers: Mapping[str, str] = {"Connection": "close"}


class ClientGone(ServiceError):
    """The client closed the connection before its answer was there; its rows cost no further compute."""

    status = 499
    code = "client_gone"


class InferenceFailed(ServiceError):
    """The runtime raised; the server's log has the cause."""

    status = 500
    code = "inference_failed"


class NotSupported(ServiceError):
    """A part of a protocol that is not served here."""

    status = 501
    code = "not_supported"


class NotReady(ServiceError):
    """The server is warming up or shutting down."""

    status = 503
    code = "not_ready"
    headers: Mapping[str, str] = {"Retry-After": "1"}


class TooManyConnections(ServiceError):
    """More connections are open than the server allows."""

    status = 503
    code = "too_many_connections"
    headers: Mapping[str, str] = {"Retry-After": "1", "Connection": "close"}


class DeadlineExpired(ServiceError):
    """The budget ran out in the queue, before any block had run."""

    status = 504
    code = "deadline_expired"


class DeadlineInfeasible(ServiceError):
    """A strict request's budget cannot be met; `details` have the smallest budget that could be."""

    status = 504
    code = "deadline_infeasible"
