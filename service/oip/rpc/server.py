"""The gRPC port: what it takes at most, how it starts, and how it ends."""

from __future__ import annotations

import logging

import grpc

from service.context import Context
from service.oip.rpc.access import Access
from service.oip.rpc.callers import KeyCheck
from service.oip.rpc.port import port_error
from service.oip.rpc.service import Service
from service.settings import Settings

logger = logging.getLogger(__name__)

_DRAIN_S = 5.0
"""How long calls have to end once the server is told to."""

_OTHER_CALLS = 64
"""Calls at a time beside those whose rows may wait: for health, metadata, statistics."""


class RpcServer:
    """`inference.GRPCInferenceService` and `grpc.health.v1.Health` on a port, in the event loop that makes it.

    Messages are at most `max_body_bytes` long, compressed or not, which is found out before they are read whole. A call for
    answers has a row at least, so more calls at a time than rows may wait would be refused later; they are at once.
    Both refusals are the library's, which knows nothing of our codes, logs and metrics. API keys and TLS are HTTP's.
    """

    def __init__(self, ctx: Context) -> None:
        self._settings = ctx.settings
        self._service = Service(ctx)
        self._server = grpc.aio.server(
            interceptors=[
                Access(log=ctx.settings.access_log),
                *([KeyCheck(ctx.keys, ctx.metrics)] if ctx.keys is not None else []),
            ],
            options=[
                ("grpc.max_receive_message_length", ctx.settings.max_body_bytes),
                ("grpc.so_reuseport", 0),  # else two servers share a port and neither knows
            ],
            maximum_concurrent_rpcs=ctx.settings.max_queue_rows + _OTHER_CALLS,
        )
        self._server.add_generic_rpc_handlers(self._service.handlers())
        self.port = 0

    async def start(self) -> None:
        """Serve; the log tells which port it is where any would do.

        Raises:
            GrpcError: the port cannot be opened.
        """
        host, port = self._settings.host, self._settings.grpc_port or 0
        address = f"[{host}]" if ":" in host else host
        credentials = _credentials(self._settings)
        try:
            if credentials is None:
                self.port = self._server.add_insecure_port(f"{address}:{port}")
            else:
                self.port = self._server.add_secure_port(f"{address}:{port}", credentials)
        except RuntimeError as exc:
            raise port_error(host, port, str(exc)) from exc
        await self._server.start()
        logger.info("gRPC at %s:%d", address, self.port)

    async def drain(self) -> None:
        """Take no more calls, and end when those that are open have, or have had their time."""
        self._service.drain()
        await self._server.stop(_DRAIN_S)


def _credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """The server's certificate; none without TLS."""
    if settings.tls_cert is None:
        return None
    chain = settings.tls_cert.read_bytes()
    key = chain if settings.tls_key is None else settings.tls_key.read_bytes()
    authorities = None if settings.tls_client_ca is None else settings.tls_client_ca.read_bytes()
    return grpc.ssl_server_credentials([(key, chain)], authorities, require_client_auth=authorities is not None)
