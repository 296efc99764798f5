"""Whether gRPC is wanted and can be had. Needs nothing of the extra `grpc` itself."""

from __future__ import annotations

import socket
from importlib.util import find_spec
from typing import TYPE_CHECKING

from service.context import Context
from service.settings import Settings

if TYPE_CHECKING:
    from service.oip.rpc.server import RpcServer


class GrpcError(Exception):
    """gRPC is wanted and cannot be had: a package is missing, or the port."""


def check_grpc(settings: Settings) -> None:
    """Find out before models are loaded whether a server with these settings could open the gRPC port they want, if any.

    Raises:
        GrpcError: it could not; the message says why.
    """
    if settings.grpc_port is None:
        return
    for package in ("google.protobuf", "grpc", "grpc_health"):
        if _missing(package):
            raise GrpcError(
                f"grpc_port needs the package {package!r}, which is not installed here: pip install 'hbll-anytime[grpc]'"
            )
    if settings.key_password is not None:
        raise GrpcError("grpc_port needs a private key that is not encrypted: the gRPC library takes no password")
    host, port = settings.host, settings.grpc_port
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have just ended do not count
            probe.bind(address)
    except OSError as exc:
        raise port_error(host, port, exc.strerror or str(exc)) from exc


async def open_rpc(ctx: Context) -> RpcServer | None:
    """The gRPC server that the settings want, started; none if they want none.

    Raises:
        GrpcError: somebody has taken the port since it was checked.
    """
    if ctx.settings.grpc_port is None:
        return None
    from service.oip.rpc.server import RpcServer

    server = RpcServer(ctx)
    await server.start()
    return server


def port_error(host: str, port: int, why: str) -> GrpcError:
    """The error of a port that cannot be opened."""
    return GrpcError(f"the gRPC port {port} of {host} cannot be opened: {why}; choose another by grpc_port, 0 for any")


def _missing(package: str) -> bool:
    try:
        return find_spec(package) is None
    except ModuleNotFoundError:  # not even the package that it is in
        return True
