"""Who may call, by the API keys that HTTP has: a key in the metadata `authorization` or `x-api-key`, looked at before a
call's message is read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import grpc

from service.errors import ServiceError
from service.keys import Keys, check_operator, read_token
from service.metrics import Metrics
from service.oip.rpc.access import Handler, note
from service.oip.rpc.names import HEALTH, INFERENCE
from service.oip.rpc.status import abort

_OPEN = {f"/{HEALTH}/Check", f"/{INFERENCE}/ServerLive", f"/{INFERENCE}/ServerReady"}
_OPERATORS = {f"/{INFERENCE}/RepositoryModelLoad", f"/{INFERENCE}/RepositoryModelUnload"}


class KeyCheck(grpc.aio.ServerInterceptor):
    """Lets no call but those for health go on without a key, nor an operator's with another's. A stream's first request is
    counted against the key's rate here, the others as they come."""

    def __init__(self, keys: Keys, metrics: Metrics) -> None:
        self._keys = keys
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """See grpc.aio.ServerInterceptor."""
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None or method in _OPEN:
            return handler
        try:
            key = self._keys.known(token_of(handler_call_details.invocation_metadata))
            note(key=key)
            self._keys.count(key)
            if method in _OPERATORS:
                check_operator(key)
        except ServiceError as error:
            self._metrics.refusals.labels(error.code).inc()
            return _refusing(error)
        return handler


def token_of(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """The key in a call's metadata."""
    found: dict[str, str] = {}
    for name, value in metadata:
        if name in ("authorization", "x-api-key"):
            found.setdefault(name, value.decode("latin-1") if isinstance(value, bytes) else value)
    return read_token(found.get("authorization"), found.get("x-api-key"))


def _refusing(error: ServiceError) -> Handler:
    """A handler that ends any call by an error, at once: the library waits for no message where there may be several."""

    async def refuse(_: object, call: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        await abort(call, error)

    return grpc.stream_stream_rpc_method_handler(refuse)
