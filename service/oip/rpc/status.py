"""Errors as gRPC tells them: a status, the sentence as its details, and trailing metadata `code`, the stable one, and
`details`, JSON of what else is known."""

from __future__ import annotations

import asyncio
import json
from typing import NoReturn

import grpc

from service.access import HEADER
from service.errors import ServiceError
from service.logs import request_id
from service.oip.rpc.access import note
from service.responses import let_go, sentence

# By HTTP's status, so that an error has one place to be defined: service/errors.py.
_STATUSES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
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


async def abort(context: grpc.aio.ServicerContext[bytes, bytes], error: ServiceError) -> NoReturn:
    """End a call by an error, which the access log is to know of. (A status that is set before the handler returns comes
    after an empty message, and clients try no call again that has begun to be answered.)"""
    note(status=status_of(error))
    metadata = [("code", error.code)]
    if error.details:
        details = json.dumps(error.details)  # in ASCII, which metadata are
        if len(details) <= _LONGEST_DETAILS:
            metadata.append(("details", details))
    # HTTP/2 forbids headers about connections.
    metadata += [(name.lower(), value) for name, value in error.headers.items() if name != "Connection"]
    if (own := request_id.get()) is not None:  # metadata that were set before are not sent
        metadata.append((HEADER.lower(), own))
    try:
        await context.abort(status_of(error), sentence(str(error)), tuple(metadata))
    except grpc.aio.AbortError as aborted:  # which the context keeps, and it the context, with the message
        asyncio.get_running_loop().call_soon(let_go, aborted)
        raise
