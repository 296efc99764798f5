"""Errors as gRPC tells them: a status, the sentence as its details, and trailing metadata `code`, the stable one, and
`details`, JSON of what else is known."""

from __future__ import annotations

import json

import grpc

from service.access import HEADER
from service.errors import ServiceError
from service.logs import request_id
from service.oip.rpc.access import note
from service.responses import sentence

# By HTTP's status, so that an error has one place to be defined: service/errors.py.
_STATUSES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    500: grpc.StatusCode.INTERNAL,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}

_LONGEST_DETAILS = 4096
"""Bytes. Clients refuse answers whose metadata are longer than 8 KiB, and would see that instead of the error."""


def status_of(error: ServiceError) -> grpc.StatusCode:
    """The status of an error."""
    return _STATUSES.get(error.status, grpc.StatusCode.UNKNOWN)


def refuse(context: grpc.aio.ServicerContext[bytes, bytes], error: ServiceError) -> bytes:
    """Have a call end by an error, which the access log is to know of, once the handler returns; what this returns may be
    its message, which is not sent. `context.abort` would keep its own exception, and with it the call, in a cycle: until a
    whole collection of garbage, what was refused would stay in memory."""
    note(status=status_of(error))
    metadata = [("code", error.code)]
    if error.details:
        details = json.dumps(error.details)  # in ASCII, which metadata are
        if len(details) <= _LONGEST_DETAILS:
            metadata.append(("details", details))
    metadata += [(name.lower(), value) for name, value in error.headers.items()]
    if (own := request_id.get()) is not None:  # metadata that were set before are not sent
        metadata.append((HEADER.lower(), own))
    context.set_code(status_of(error))
    context.set_details(sentence(str(error)))
    context.set_trailing_metadata(tuple(metadata))
    return b""
