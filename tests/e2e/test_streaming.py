"""Streams and clients that leave: a real uvicorn on a real socket; for the latter a runner that tests can hold back."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import uvicorn

from service.app import create_app
from service.repository import Repository
from service.settings import Settings
from tests.conftest import LiveServer, wait_for
from tests.fakes import FakeRunner, fake_model
from training.dataset import Dataset


def events(response: httpx.Response) -> Iterator[tuple[str, dict[str, object]]]:
    """(event, data) of a stream, as they come."""
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def stream(server: LiveServer, body: dict[str, object]) -> list[tuple[str, dict[str, object]]]:
    with httpx.stream("POST", f"{server.url}/v1/models/digits/predict/stream", json=body, timeout=30) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return list(events(response))


@pytest.fixture
def inputs(digits: Dataset) -> list[object]:
    return [image.tolist() for image in digits.test.x[:6]]


def test_every_rung_is_an_event_and_the_last_is_final(server: LiveServer, inputs: list[object]) -> None:
    climb = httpx.get(f"{server.url}/v1/models/digits").json()["climb"]
    *answers, (name, end) = stream(server, {"inputs": inputs})
    assert name == "end"
    assert end["deadline_met"] is None
    for row in range(len(inputs)):
        mine = [data for event, data in answers if data["row"] == row and event == "answer"]
        assert [data["path"] for data in mine] == climb
        assert [data["final"] for data in mine] == [False] * (len(climb) - 1) + [True]
        assert [data["stopped_by"] for data in mine] == [None] * (len(climb) - 1) + ["complete"]
    whole = httpx.post(f"{server.url}/v1/models/digits/predict", json={"inputs": inputs}).json()["predictions"]
    for row, prediction in enumerate(whole):
        last = [data for _, data in answers if data["row"] == row][-1]
        assert last["label"] == prediction["label"]
        assert last["confidence"] == pytest.approx(prediction["confidence"], abs=1e-5)


def test_wishes_end_a_stream_early(server: LiveServer, inputs: list[object]) -> None:
    answers = stream(server, {"inputs": inputs, "min_confidence": 0.0})[:-1]
    assert [(data["depth"], data["final"], data["stopped_by"]) for _, data in answers] == [(1, True, "confidence")] * 6
    answers = stream(server, {"inputs": inputs[:1], "depth": 7})[:-1]
    assert [(data["depth"], data["final"], data["stopped_by"]) for _, data in answers] == [(7, True, "depth")]


def test_monotone_confidence_never_falls_and_plain_confidence_does(server: LiveServer, digits: Dataset) -> None:
    inputs = [image.tolist() for image in digits.test.x[:40]]

    def falls(body: dict[str, object]) -> int:
        confidences: dict[object, list[float]] = {}
        for _, data in stream(server, {"inputs": inputs, **body})[:-1]:
            confidences.setdefault(data["row"], []).append(float(str(data["confidence"])))
        return sum(bool((np.diff(values) < 0).any()) for values in confidences.values())

    assert falls({"monotone": True}) == 0
    assert falls({}) > 0, "if nothing ever fell, the line above would say nothing"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"inputs": [3]}, 422, "invalid_input"),
        ({"inputs": [], "depth": 1}, 422, "invalid_input"),
        ({"inputs": [[[0.5] * 28] * 28], "monotone": True, "max_risk": 0.1}, 422, "invalid_input"),
        ({"inputs": [[[0.5] * 28] * 28], "latency_budget_ms": 0.0001, "strict": True}, 504, "deadline_infeasible"),
    ],
)
def test_errors_before_the_first_answer_are_a_status(server: LiveServer, body: object, status: int, code: str) -> None:
    response = httpx.post(f"{server.url}/v1/models/digits/predict/stream", json=body)
    assert (response.status_code, response.json()["code"]) == (status, code)


class HeldServer:
    """The app around a fake runner, served by uvicorn in a thread."""

    def __init__(self) -> None:
        # Long enough for the inference thread: the event loop must not be what is held.
        self.runner = FakeRunner(before=lambda _: time.sleep(0.001))
        app = create_app(Settings(grpc_port=0), Repository([fake_model(runner=self.runner)]))
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


@pytest.fixture
def held() -> Iterator[HeldServer]:
    server = HeldServer()
    yield server
    server.close()


@pytest.mark.parametrize("path", ["predict", "predict/stream", "infer", "raw"])
def test_clients_that_leave_the_queue_cost_no_block(held: HeldServer, path: str) -> None:
    held.runner.go.clear()
    held.runner.began.clear()
    first = held.send(path)
    assert held.runner.began.wait(20)
    waiting = [held.send(path) for _ in range(20)]
    wait_for(lambda: held.metric("hbll_queue_rows") == 20)
    for connection in waiting:
        connection.close()
    wait_for(lambda: held.metric('hbll_refusals_total{code="client_gone"}') == 20)
    assert held.metric('hbll_failed_seconds_count{model="fake",version="1"}') == 20
    held.runner.go.set()
    received = b""
    while b"queue_ms" not in received:  # of the answer, or of the event that ends the stream
        chunk = first.recv(4000)
        assert chunk, received
        received += chunk
    first.close()
    wait_for(lambda: held.metric("hbll_queue_rows") == 0)
    assert all(count == 1 for _, count, _ in held.runner.runs)
    assert (
        held.metric('hbll_block_rows_total{model="fake",version="1"}') == 1 + 1 + 1 + 7
    )  # the first client's climb, alone


def test_a_stream_that_is_left_stops_at_the_next_rung(held: HeldServer) -> None:
    """The first rung is answered; the client leaves while the second runs; the third never does."""
    second, left = threading.Event(), threading.Event()

    def before(nodes: tuple[int, ...]) -> None:
        if nodes == (6,):
            second.set()
            assert left.wait(20)

    held.runner.before = before
    connection = held.send("predict/stream")
    wait_for(lambda: b"event: answer" in connection.recv(4000))
    assert second.wait(20)
    connection.close()
    wait_for(lambda: held.metric('hbll_refusals_total{code="client_gone"}') == 1)
    left.set()
    response = httpx.post(f"{held.url}/v1/models/fake/predict", json={"inputs": [[[0.1, 0], [0, 0]]], "path": "4"})
    assert response.status_code == 200
    assert [nodes for nodes, _, _ in held.runner.runs] == [(4,), (6,), (4,)]
