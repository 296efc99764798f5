"""The gRPC port: what it takes at most, how it starts, and how it ends."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import grpc

from service.context import Context
from service.oip.rpc.port import port_error
from service.oip.rpc.service import Service

logger = logging.getLogger(__name__)

_DRAIN_S = 5.0
"""How long calls have to end once the server is told to. HTTP has drained before."""

_OTHER_CALLS = 64
"""Calls at a time beside those whose rows may wait: for health, metadata, statistics."""


class RpcServer:
    """`inference.GRPCInferenceService` and `grpc.health.v1.Health` on a port, in the event loop that makes it.

    Messages are at most `max_body_bytes` long, compressed or not, which is found out before they are read whole. A call for
    answers has a row at least, so more calls at a time than rows may wait would be refused later; they are at once.
    `interceptors` see each call, its method and metadata, first: whoever decides who may call belongs there.
    """

    def __init__(self, ctx: Context, interceptors: Sequence[grpc.aio.ServerInterceptor] = ()) -> None:
        self._service = Service(ctx)
        self._server = grpc.aio.server(
            interceptors=interceptors,
            options=[
                ("grpc.max_receive_message_length", ctx.settings.max_body_bytes),
                ("grpc.so_reuseport", 0),  # else two servers share a port and neither knows
            ],
            maximum_concurrent_rpcs=ctx.settings.max_queue_rows + _OTHER_CALLS,
        )
        self._server.add_generic_rpc_handlers(self._service.handlers())
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Serve at `host`; 0 as `port` is any that is free, which the log tells.

        Raises:
            GrpcError: the port cannot be opened.
        """
        address = f"[{host}]" if ":" in host else host
        try:
            self.port = self._server.add_insecure_port(f"{address}:{port}")
        except RuntimeError as exc:
            raise port_error(host, port, str(exc)) from exc
        await self._server.start()
        logger.info("gRPC at %s:%d", address, self.port)

    async def drain(self) -> None:
        """Take no more calls, and end when those that are open have, or have had their time."""
        self._service.drain()
        await self._server.stop(_DRAIN_S)
