"""A real server whose runner the tests can hold back."""

from __future__ import annotations

import socket
import threading
import time

import httpx
import numpy as np
import uvicorn

from service.app import create_app
from service.repository import Repository
from service.settings import Settings
from tests.conftest import wait_for
from tests.fakes import FakeRunner, fake_model


class HeldServer:
    """The app around a fake runner, served by uvicorn in a thread, with a port for gRPC."""

    def __init__(self, **settings: object) -> None:
        # Long enough for the inference thread: the event loop must not be what is held.
        self.runner = FakeRunner(before=lambda _: time.sleep(0.001))
        app = create_app(Settings(grpc_port=0, **settings), Repository([fake_model(runner=self.runner)]))
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        wait_for(lambda: self._server.started)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.rpc = f"127.0.0.1:{app.state.rpc.port}"
        wait_for(lambda: httpx.get(f"{self.url}/health/ready").status_code == 200)
        self.runner.runs.clear()

    def metric(self, line: str) -> float:
        found = [text for text in httpx.get(f"{self.url}/metrics").text.splitlines() if text.startswith(line)]
        return float(found[0].split()[-1]) if found else 0.0

    def send(self, path: str) -> socket.socket:
        body = b'{"inputs": [[[0.1, 0], [0, 0]]], "min_confidence": 1}'
        if path == "infer":
            tensor = b'{"name": "x", "shape": [1, 2, 2], "datatype": "FP32", "data": [0.1, 0, 0, 0]}'
            body = b'{"inputs": [%s], "parameters": {"min_confidence": 1}}' % tensor
        kind = b"application/json"
        if path == "raw":
            path, kind, body = "predict?min_confidence=1", b"application/octet-stream", np.float32([0.1, 0, 0, 0]).tobytes()
        version = "v2" if path == "infer" else "v1"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        head = f"POST /{version}/models/fake/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind.decode()}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection

    def end(self) -> None:
        """What SIGTERM does; returns when the server has ended."""
        self._server.should_exit = True
        self._thread.join()

    def close(self) -> None:
        self.runner.go.set()
        self.end()
