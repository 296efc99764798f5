"""All malformed requests of the contract's tests, again and again, to a real server: what they leave behind."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from benchmarks.live import free_port
from tests.conftest import LiveServer, Trained, start_server
from tests.contract import test_errors as native
from tests.contract import test_grpc_errors as rpc
from tests.contract import test_oip_errors as oip

SETTLING, ROUNDS = 4, 8
KEPT_MB = 0.004
"""For each request, were nothing of it freed, a common one of 3 KB would keep about this."""


@pytest.fixture
def rpc_port() -> int:
    return free_port()


@pytest.fixture
def live(trained: Trained, rpc_port: int, tmp_path: Path) -> Iterator[LiveServer]:
    limits = {"HBLL_MAX_BODY_BYTES": "400000", "HBLL_MAX_REQUEST_ROWS": "40", "HBLL_GRPC_PORT": str(rpc_port)}
    with start_server(trained.models, tmp_path, limits) as server:
        yield server


def memory_mb(server: LiveServer) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (line,) = re.findall(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(line) / 1000


def ask_all(http: httpx.Client, channel: grpc.Channel) -> int:
    """Send every request; how many there were, all of them refused by a 4xx or its like."""
    json_header = {"content-type": "application/json"}
    bodies = [body for body, _ in native.UNPARSABLE.values()]
    bodies += [json.dumps(body).encode() for body, _ in native.INVALID.values()]
    for body in bodies:
        response = http.post("/v1/models/digits/predict", content=body, headers=json_header)
        assert (response.status_code // 100, set(response.json()) >= {"error", "code"}) == (4, True), response.text
    for case in oip.CASES.values():
        response = http.post(case.url, content=case.content, headers=case.headers)
        assert (response.status_code, set(response.json()) >= {"error", "code"}) == (case.status, True), response.text
    for wrong in rpc.CASES.values():
        rpc.refused(channel, wrong)
    return len(bodies) + len(oip.CASES) + len(rpc.CASES)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read where Linux tells it")
def test_malformed_requests_are_refused_and_leave_nothing_in_memory(live: LiveServer, rpc_port: int) -> None:
    """The first rounds fill caches and arenas, the others must not add up."""
    with httpx.Client(base_url=live.url, timeout=60) as http, grpc.insecure_channel(f"127.0.0.1:{rpc_port}") as channel:
        asked = min(ask_all(http, channel) for _ in range(SETTLING))
        assert asked >= 200
        before = memory_mb(live)
        for _ in range(ROUNDS):
            ask_all(http, channel)
        grown = memory_mb(live) - before
        assert http.get("/health/ready").status_code == 200
        assert grown < KEPT_MB * ROUNDS * asked
