"""New versions and hard ends with a real server: processes, sockets, files that are copied while it looks."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.conftest import LiveServer, Trained, start_server, wait_for

HEADERS = {"content-type": "application/octet-stream"}
ROW = np.full((28, 28), 0.5, "<f4").tobytes()


def metric(server: LiveServer, line: str) -> float:
    found = [text for text in httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines() if text.startswith(line)]
    return float(found[0].split()[-1]) if found else 0.0


def memory_mb(server: LiveServer) -> float:
    (line,) = re.findall(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text(), re.MULTILINE)
    return int(line) / 1000


@pytest.fixture
def models(trained: Trained, tmp_path: Path) -> Path:
    shutil.copytree(trained.bundle, tmp_path / "models" / "digits" / "1")
    return tmp_path / "models"


@pytest.fixture
def polling(models: Path, tmp_path: Path) -> Iterator[LiveServer]:
    with start_server(models, tmp_path, {"HBLL_POLL_S": "0.1"}) as server:
        yield server


class Clients:
    """Ask without a pause; every answer's version and every failure."""

    def __init__(self, url: str, number: int = 3, *, rising: bool = True) -> None:
        self.rising = rising
        self.versions: list[int] = []
        self.failures: list[str] = []
        self._go_on = True
        self._threads = [threading.Thread(target=self._ask, args=(url, {} if n else HEADERS)) for n in range(number)]
        for thread in self._threads:
            thread.start()

    def _ask(self, url: str, headers: dict[str, str]) -> None:
        content = {"content": ROW, "headers": headers} if headers else {"json": {"inputs": [[[0.5] * 28] * 28] * 6}}
        last = 0
        with httpx.Client(base_url=url, timeout=30) as client:
            while self._go_on:
                response = client.post("/v1/models/digits/predict", **content)
                if response.status_code != 200:
                    self.failures.append(response.text)
                    continue
                version = response.json()["version"]
                if self.rising and version < last:
                    self.failures.append(f"version {version} after {last}")
                last = version
                self.versions.append(version)

    def stop(self) -> None:
        self._go_on = False
        for thread in self._threads:
            thread.join()


def test_new_versions_are_served_under_load_without_one_failed_request(polling: LiveServer, models: Path) -> None:
    """Copied into place as people do, file by file; a damaged one in between, which is repaired at last."""
    clients = Clients(polling.url)
    try:
        wait_for(lambda: len(clients.versions) > 50)
        shutil.copytree(models / "digits" / "1", models / "digits" / "2")
        wait_for(lambda: clients.versions[-1] == 2)
        half = (models / "digits" / "1" / "weights.bin").read_bytes()[:-4]
        shutil.copytree(models / "digits" / "1", models / "digits" / ".3")
        (models / "digits" / ".3" / "weights.bin").write_bytes(half)
        (models / "digits" / ".3").rename(models / "digits" / "3")
        before = metric(polling, 'hbll_reloads_total{loaded="false",model="digits"}')
        wait_for(lambda: "version 3 of digits is not served" in polling.log.read_text())
        seen = len(clients.versions)
        wait_for(lambda: len(clients.versions) > seen + 100)
        assert clients.versions[-1] == 2
        assert polling.log.read_text().count("version 3 of digits is not served") == 1
        assert metric(polling, 'hbll_reloads_total{loaded="false",model="digits"}') - before <= 1
        shutil.copy(models / "digits" / "1" / "weights.bin", models / "digits" / "3" / "weights.bin")
        wait_for(lambda: clients.versions[-1] == 3)
    finally:
        clients.stop()
    assert clients.failures == []
    assert set(clients.versions) == {1, 2, 3}
    assert metric(polling, 'hbll_reloads_total{loaded="true",model="digits"}') == 2
    assert "Traceback" not in polling.log.read_text()


def test_versions_come_and_go_beside_each_other_without_one_failed_request(models: Path, tmp_path: Path) -> None:
    """Two at once: named ones answer as long as they are served; the newest is taken back under load."""
    server = start_server(models, tmp_path, {"HBLL_POLL_S": "0.1", "HBLL_VERSIONS": "2"})

    def ask(version: int) -> httpx.Response:
        return httpx.post(
            f"{server.url}/v1/models/digits/versions/{version}/predict", content=ROW, headers=HEADERS, timeout=30
        )

    try:
        clients = Clients(server.url, rising=False)
        try:
            for version in (2, 3):
                shutil.copytree(models / "digits" / "1", models / "digits" / str(version))
                wait_for(lambda version=version: clients.versions[-1:] == [version])
            wait_for(lambda: ask(1).status_code == 404)
            assert ask(1).json()["versions"] == ["3", "2"]
            assert [ask(version).json()["version"] for version in (3, 2)] == [3, 2]
            shutil.rmtree(models / "digits" / "3")
            wait_for(lambda: clients.versions[-1] == 2)
            assert ask(2).json()["version"] == 2
            wait_for(lambda: ask(1).status_code == 200)  # which is among the two highest again
            assert ask(3).json()["versions"] == ["2", "1"]
        finally:
            clients.stop()
        assert clients.failures == []
        assert set(clients.versions) == {1, 2, 3}
        told = httpx.get(f"{server.url}/v1/models/digits/versions", timeout=30).json()["versions"]
        assert [(each["version"], each["ready"], each["default"]) for each in told] == [(2, True, True), (1, True, False)]
        httpx.get(f"{server.url}/metrics", timeout=30)
        assert metric(server, 'hbll_requests_total{model="digits",version="2"}') > 0
        assert metric(server, 'hbll_requests_total{model="digits",version="3"}') == 0
        assert "Traceback" not in server.log.read_text()
    finally:
        if server.process.poll() is None:
            server.stop()


def test_replaced_versions_do_not_add_up_in_memory(polling: LiveServer, models: Path) -> None:
    def serve(version: int) -> None:
        shutil.copytree(models / "digits" / "1", models / "digits" / f".{version}")
        (models / "digits" / f".{version}").rename(models / "digits" / str(version))
        assert httpx.post(f"{polling.url}/v2/repository/models/digits/load", timeout=30).status_code == 200
        answer = httpx.post(f"{polling.url}/v1/models/digits/predict", content=ROW, headers=HEADERS)
        assert answer.json()["version"] == version

    for version in range(2, 6):
        serve(version)
    before = memory_mb(polling)
    for version in range(6, 22):
        serve(version)
    assert memory_mb(polling) - before < 12  # sixteen sessions of this model take 30


def test_a_server_that_is_told_to_end_answers_all_whom_it_let_in(polling: LiveServer) -> None:
    """200 or a refusal of the one shape; no answer is cut off, and no client waits for ever."""
    statuses: list[int] = []
    ends: list[str] = []
    bodies = threading.Semaphore(0)
    port = httpx.URL(polling.url).port

    def ask() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            while True:
                try:
                    response = client.post("/v1/models/digits/predict", content=ROW, headers=HEADERS)
                except httpx.ConnectError:
                    return
                except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as exc:
                    ends.append(str(exc))
                    return
                assert set(response.json()) >= ({"error"} if response.is_error else {"predictions"})
                statuses.append(response.status_code)
                bodies.release()

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        bodies.acquire(timeout=30)
    polling.process.send_signal(signal.SIGTERM)
    assert polling.process.wait(timeout=30) in (0, -15)
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert set(statuses) <= {200, 503}
    assert not [end for end in ends if "message body" in end]  # else: idle connections that were closed
    assert "Traceback" not in polling.log.read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"HBLL_MIN_DEPTH": "8"}, "model digits: expected min_depth to be at most 7, the deepest offered path, got 8"),
        ({"HBLL_POLICY": "static(9-9)"}, "model digits: policy static(9-9): the model offers the paths 4, "),
        ({"HBLL_POLICY": "best"}, "wrong setting: policy (environment HBLL_POLICY): expected a policy of ladder-edf, "),
        ({"HBLL_PER_MODEL": '{"cats": {"min_depth": 2}}', "HBLL_POLL_S": "0"}, "holds no model cats, only digits"),
        ({"HBLL_VERSIONS": "[2]"}, "holds none of the versions (2,), only 1"),
        (
            {"HBLL_VERSIONS": "newest"},
            "wrong setting: versions (environment HBLL_VERSIONS): expected latest, all, how many",
        ),
        ({"HBLL_PER_MODEL": "{"}, 'wrong setting: error parsing value for field "per_model"'),
    ],
)
def test_settings_that_no_model_can_have_stop_start_up(trained: Trained, settings: dict[str, str], message: str) -> None:
    command = [sys.executable, "-m", "hbll", "serve", str(trained.models), "--port", "0"]
    environment = {"COLUMNS": "900", **settings}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
