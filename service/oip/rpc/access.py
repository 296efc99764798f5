"""Of gRPC calls what `service.access` does for HTTP requests: their ids, in the metadata `x-request-id`, and their lines in
the access log. Each request of a stream has a line too. What a line tells beside time and status, the RPCs `note`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from service.access import HEADER, id_of, log_request
from service.logs import request_id
from service.oip.rpc.stubs import open_inference_pb2 as pb

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic for mypy alone

_METHODS = {
    f"/{service.full_name}/{method.name}"
    for file in (pb.DESCRIPTOR, health_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
}

_state: ContextVar[dict[str, Any]] = ContextVar("call")


def note(**found: object) -> None:
    """Let the access log know what `service.access.log_request` tells of the call, or of the request of a stream, that is
    being answered; the `status` if it is an error's."""
    _state.get().update(found)


def note_model(request: Message) -> None:
    """Let it know whose model a message names, if it does."""
    for field in ("model_name", "name"):
        if field in request.DESCRIPTOR.fields_by_name:
            note(model=getattr(request, field) or None)


def count_sent(sent_bytes: int) -> None:
    """Let it know of bytes that went out in answer."""
    state = _state.get()
    state["bytes_out"] = state.get("bytes_out", 0) + sent_bytes


@contextmanager
def request_of_stream(bytes_in: int) -> Iterator[None]:
    """A request of a stream has a line of its own, with the call's id and key; what is noted within concerns it alone."""
    own = _state.get() | {"arrived_s": time.monotonic(), "bytes_in": bytes_in}
    token = _state.set(own)
    try:
        with _logged(own):
            yield
    finally:
        _state.reset(token)


class Access(grpc.aio.ServerInterceptor):
    """Around all others. With `log` each call is logged when it has ended, refused ones included; where the library refuses
    to read a message, as one whose client left."""

    def __init__(self, *, log: bool) -> None:
        self._log = log

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """See grpc.aio.ServerInterceptor. Calls are tasks: what is set here holds until the call has ended."""
        method = handler_call_details.method
        state: dict[str, Any] = {
            "request_id": id_of(_given_id(handler_call_details)),
            "arrived_s": time.monotonic(),
            "route": method if method in _METHODS else None,  # else it may be anything
            "log": self._log,
        }
        _state.set(state)
        request_id.set(state["request_id"])
        handler = await continuation(handler_call_details)
        return handler and _watched(handler, state)


def _watched(handler: Handler, state: dict[str, Any]) -> Handler:
    """`handler`, which is of one of the two kinds there are here: `Service` reads the messages."""
    behaviour: Any = handler.stream_stream if handler.response_streaming else handler.stream_unary
    trailing = ((HEADER.lower(), state["request_id"]),)  # of calls that end well: `status.abort` sets its own

    async def unary(messages: object, call: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        call.set_trailing_metadata(trailing)
        with _logged(state):
            response: bytes = await behaviour(messages, call)
            count_sent(len(response))
            return response

    async def stream(messages: object, call: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        call.set_trailing_metadata(trailing)
        with _logged(state):
            await behaviour(messages, call)

    if handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(stream)
    return grpc.stream_unary_rpc_method_handler(unary)


@contextmanager
def _logged(state: dict[str, Any]) -> Iterator[None]:
    """Logs in the end, with the status that was noted if it was an error of ours."""
    try:
        yield
    except BaseException as exc:
        state.setdefault("status", _status(exc))
        raise
    finally:
        if state["log"]:
            status: grpc.StatusCode = state.get("status", grpc.StatusCode.OK)
            log_request(state | {"status": status.value[0]}, "gRPC", state["route"])


def _status(exc: BaseException) -> grpc.StatusCode:
    """The status of a call that ends by an exception of Python's or of the library's: most are of clients that go."""
    gone = isinstance(exc, asyncio.CancelledError | GeneratorExit | grpc.aio.BaseError)
    return grpc.StatusCode.CANCELLED if gone else grpc.StatusCode.UNKNOWN


def _given_id(details: grpc.HandlerCallDetails) -> bytes | None:
    for name, value in details.invocation_metadata:
        if name == HEADER.lower():
            return value if isinstance(value, bytes) else value.encode()
    return None
