from __future__ import annotations

import asyncio
import gc
import socket
import time
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from fastapi import FastAPI
from uvicorn.server import ServerState

from benchmarks.live import free_port
from service.gate import Gate
from service.listener import BadCertificate, Server, server_config
from service.metrics import Metrics
from service.settings import Settings


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_an_encrypted_key_needs_its_password_and_nobody_is_asked_for_it(tmp_path: Path, form: PrivateFormat) -> None:
    certificate, chain, key = trustme.CA().issue_cert("127.0.0.1"), tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
    plain = load_pem_private_key(certificate.private_key_pem.bytes(), None)
    key.write_bytes(plain.private_bytes(Encoding.PEM, form, BestAvailableEncryption(b"right")))
    app = FastAPI()
    app.state.metrics, app.state.gate = Metrics(), Gate()
    files = {"tls_cert": chain, "tls_key": key}
    assert server_config(app, Settings(**files, tls_key_password="right")).ssl is not None
    with pytest.raises(BadCertificate, match=r"key\.pem is encrypted: expected its password by tls_key_password"):
        server_config(app, Settings(**files))
    with pytest.raises(BadCertificate, match="the key's password if it has one"):
        server_config(app, Settings(**files, tls_key_password="wrong"))


def test_who_connects_is_accepted_however_long_the_turns_of_the_loop_are() -> None:
    """uvloop alone accepts one connection in a turn: of those who connect in an overload the last waits for seconds."""
    uvloop = pytest.importorskip(
        "uvloop", reason="there is none for Windows, where asyncio's own loops accept all that wait"
    )
    app = FastAPI()
    app.state.metrics, app.state.gate = Metrics(), Gate()
    port, open_then = free_port(), []

    async def nothing() -> None:
        pass

    server = Server(server_config(app, Settings(port=port, header_timeout_s=60)), nothing)

    @app.get("/")
    async def slow() -> None:
        open_then.append(len(server.server_state.connections))
        time.sleep(0.002)  # noqa: ASYNC251 - it is what an overload does

    async def test() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        with ExitStack() as stack:
            for _ in range(40):  # the kernel takes them; the loop does not turn meanwhile
                client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            while len(open_then) < 40:
                await asyncio.sleep(0)
        server.should_exit = True
        await serving

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test())
    assert open_then[4] >= 16


class Wire(asyncio.Transport):
    """A transport that leads nowhere."""

    closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


def test_a_request_came_when_the_gate_says_but_not_before_its_client_had_the_answer_before() -> None:
    app = FastAPI()
    app.state.metrics, app.state.gate = Metrics(), Gate()
    made = server_config(app, Settings()).http_protocol_class
    began_s = time.monotonic()
    app.state.gate.came_s = lambda now_s: now_s - 1.0

    async def test() -> None:
        connection = cast(type, made)(config=server_config(app, Settings()), server_state=ServerState(), app_state={})
        connection.connection_made(Wire())
        arrived_s = []
        for _ in range(2):
            connection.data_received(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
            arrived_s.append(connection.cycle.scope["state"]["arrived_s"])
            while not connection.cycle.response_complete:
                await asyncio.sleep(0.001)
        assert arrived_s[0] < began_s < arrived_s[1]
        connection.connection_lost(None)

    asyncio.run(test())


@pytest.mark.parametrize("left", [False, True])
def test_who_is_refused_unread_or_left_leaves_nothing_for_the_garbage_collector(left: bool) -> None:
    """Bug found: with the connection, the body was kept until it came."""
    app = FastAPI()
    app.state.metrics, app.state.gate = Metrics(), Gate()
    made = server_config(app, Settings()).http_protocol_class

    async def turns() -> None:
        connections = []
        for _ in range(20):
            connection = cast(type, made)(config=server_config(app, Settings()), server_state=ServerState(), app_state={})
            connection.connection_made(Wire())
            target = b"/v1/models/m/predict?latency_budget_ms=0.001"
            connection.data_received(b"POST " + target + b" HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc")
            connections.append(connection)
        assert app.state.gate.waiting() == 12
        gone = [weakref.ref(connection) for connection in connections[16:]]  # neither the first of a turn
        if left:
            for connection in connections[8:]:
                connection.connection_lost(None)
        for _ in range(5):
            await asyncio.sleep(0)
        assert app.state.gate.waiting() == 0
        for connection in connections:
            if not left:
                connection.connection_lost(None)
        connections.clear()
        del connection
        await asyncio.sleep(0)
        assert sum(each() is None for each in gone) >= 3

    gc.collect()
    gc.disable()
    try:
        asyncio.run(turns())
    finally:
        gc.enable()
