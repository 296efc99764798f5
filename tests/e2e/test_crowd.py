"""Many requests at once, at a real server: it is stopped while they come, so that it finds all of them in one turn."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Literal
from urllib.parse import urlencode

import httpx
import numpy as np
import pytest

from tests.conftest import LiveServer, Trained, start_server, wait_for

CROWD = 60
TARGET = "/v1/models/digits/predict"
JSON = {"inputs": np.zeros((1, 28, 28)).tolist()}
RAW = np.zeros((28, 28), "<f4").tobytes()
INFER = "/v2/models/digits/infer"
ROW = {"name": "x", "datatype": "FP32", "shape": [1, 28, 28], "parameters": {"binary_data_size": len(RAW)}}

Kind = Literal["raw", "json", "v2"]


@pytest.fixture(scope="module")
def server(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with start_server(trained.models, tmp_path_factory.mktemp("crowd"), {"HBLL_ACCESS_LOG": "1"}) as live:
        yield live


@pytest.fixture
def connections(server: LiveServer) -> Iterator[list[HTTPConnection]]:
    url = httpx.URL(server.url)
    with ExitStack() as stack:
        opened = [HTTPConnection(url.host, url.port, timeout=60) for _ in range(CROWD)]
        for connection in opened:
            stack.callback(connection.close)
            connection.connect()
        yield opened


def ask(server: LiveServer, connections: list[HTTPConnection], budget_ms: float, kind: Kind) -> list[HTTPResponse]:
    """One request on each connection, all in one turn of the server's loop."""
    server.process.send_signal(signal.SIGSTOP)
    try:
        for number, connection in enumerate(connections):
            headers = {"X-Request-Id": f"crowd-{number}"}
            budget = {"latency_budget_ms": budget_ms}
            if kind == "raw":
                headers["Content-Type"] = "application/octet-stream"
                connection.request("POST", f"{TARGET}?{urlencode(budget)}", RAW, headers)
            elif kind == "json":
                body = json.dumps(JSON | budget)
                connection.request("POST", TARGET, body, headers | {"Content-Type": "application/json"})
            else:
                body = json.dumps({"inputs": [ROW], "parameters": budget})
                headers["Inference-Header-Content-Length"] = str(len(body))
                connection.request("POST", INFER, body.encode() + RAW, headers)
    finally:
        server.process.send_signal(signal.SIGCONT)
    return [connection.getresponse() for connection in connections]


def refusals(server: LiveServer, code: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    found = re.search(rf'^hbll_refusals_total\{{code="{code}"\}} (\S+)', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize("kind", ["raw", "json", "v2"])
def test_who_is_late_is_refused_unread_and_keeps_the_connection(
    server: LiveServer, connections: list[HTTPConnection], kind: Kind
) -> None:
    before = refusals(server, "deadline_expired")
    unread = 0
    for number, response in enumerate(ask(server, connections, 0.001, kind)):
        answer = json.loads(response.read())
        assert (response.status, answer["code"]) == (504, "deadline_expired")
        assert response.headers["X-Request-Id"] == f"crowd-{number}"
        unread += "for the server to read it" in answer["error"]
    assert CROWD / 2 < unread < CROWD  # the first eight are begun with
    assert refusals(server, "deadline_expired") == before + CROWD
    for response in ask(server, connections, 60_000, kind):
        assert response.status == 200, response.read()
        response.read()
    assert httpx.get(f"{server.url}/metrics").text.count("hbll_unread_requests 0.0") == 1


def test_the_access_log_has_who_was_refused_unread(server: LiveServer, connections: list[HTTPConnection]) -> None:
    for response in ask(server, connections, 0.001, "raw"):
        response.read()

    expected = {(f"crowd-{number}", "POST", 504) for number in range(CROWD)}

    def logged() -> bool:
        lines = [json.loads(line) for line in server.log.read_text().splitlines() if '"crowd-' in line]
        return {(line["request_id"], line["method"], line["status"]) for line in lines[-CROWD:]} == expected

    wait_for(logged)  # lines are written after the answers


def test_a_crowd_that_leaves_is_counted_and_nobody_else_is_disturbed(
    server: LiveServer, connections: list[HTTPConnection]
) -> None:
    before = refusals(server, "client_gone")
    server.process.send_signal(signal.SIGSTOP)
    try:
        for connection in connections:
            connection.request("POST", f"{TARGET}?depth=best", RAW, {"Content-Type": "application/octet-stream"})
            connection.close()
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert httpx.post(f"{server.url}{TARGET}", json=JSON).status_code == 200
    assert refusals(server, "client_gone") > before + CROWD / 2  # the first may have been answered before it showed


@pytest.mark.parametrize("accepted", [True, False])
def test_a_crowd_that_came_before_sigterm_is_answered(trained: Trained, tmp_path: Path, accepted: bool) -> None:
    with ExitStack() as stack:
        live = start_server(trained.models, tmp_path)
        stack.callback(live.process.kill)
        url = httpx.URL(live.url)
        connections = [HTTPConnection(url.host, url.port, timeout=60) for _ in range(CROWD)]
        for connection in connections:
            stack.callback(connection.close)
        if accepted:
            for connection in connections:
                connection.request("GET", "/v2/health/live")
                connection.getresponse().read()
        live.process.send_signal(signal.SIGSTOP)
        for connection in connections:  # which the kernel takes, if they are to be opened
            connection.request("POST", f"{TARGET}?depth=1", RAW, {"Content-Type": "application/octet-stream"})
        live.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)  # uvicorn looks every 0.1 s whether it is to end: now it does at once
        live.process.send_signal(signal.SIGCONT)
        assert {connection.getresponse().status for connection in connections} == {200}
        for connection in connections:
            connection.close()
        assert live.process.wait(timeout=30) == 0
