"""Streams and clients that leave: a real uvicorn on a real socket; for the latter a runner that tests can hold back."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from tests.conftest import LiveServer, wait_for
from tests.e2e.held import HeldServer
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
