"""Real servers under an open-loop load: one process per policy, requests sent at their times, answers judged."""

from __future__ import annotations

import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from benchmarks.load import Outcome, Request, lateness, run_replay
from benchmarks.memory import pss_mb
from benchmarks.priority import first_in_line
from benchmarks.shares import Shares
from benchmarks.traces import Arrivals, poisson
from family.manifest import BundleError, Manifest, load_manifest
from training.dataset import Split

DEFAULT_MODELS = Path("runs/bench-models")

_START_S = 120
_LOG_BYTES = 4000
_CONTENT_TYPE = ((b"content-type", b"application/octet-stream"),)


@dataclass(slots=True, eq=False)
class Server:
    """A running `hbll serve` of one model."""

    policy: str
    host: str
    port: int
    model: str
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> Any:
        """JSON of a GET."""
        return httpx.get(f"http://{self.host}:{self.port}{path}", timeout=10).raise_for_status().json()

    @property
    def memory_mb(self) -> float:
        """Proportional set size of the process (Linux)."""
        return pss_mb(self.process.pid)

    def metric(self, name: str) -> float:
        """The sum of a Prometheus metric over its labels, or one series, `name{label="value"}`."""
        text = httpx.get(f"http://{self.host}:{self.port}/metrics", timeout=10).text
        lines = [line for line in text.splitlines() if line.startswith((name + "{", name + " "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    @property
    def cpu_s(self) -> float:
        """Processor time of the process so far (Linux)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """One that nobody listens at just now, and below those from which the system gives one to every connection that a
    client makes: it might be gone before the server that it is for takes it."""
    for port in random.SystemRandom().sample(range(15_000, 32_000), 100):  # processes side by side choose others
        with socket.socket() as candidate, suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("of a hundred ports on 127.0.0.1 none is free")


def only_bundle(models: Path) -> tuple[Path, Manifest]:
    """The one bundle in a folder of models.

    Raises:
        BundleError: there is none or another one, or it is damaged.
    """
    bundles = [folder for folder in models.glob("*/*") if folder.is_dir()]
    if len(bundles) != 1:
        raise BundleError(f"{models}: expected one bundle, MODEL/VERSION, got {len(bundles)}")
    return bundles[0], load_manifest(bundles[0])


@contextmanager
def started(command: Sequence[str], environment: Mapping[str, str], url: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of a server, once it answers at `url` with 200; ended with SIGTERM, if it has not ended.

    Raises:
        RuntimeError: it ended before, or took longer than two minutes; with the end of what it wrote.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            if not _answers(process, url):
                log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_BYTES))
                raise RuntimeError(
                    f"the server did not become ready within {_START_S} s, or ended: status {process.poll()}\n"
                    + log.read().decode(errors="replace")
                )
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def serve(models: Path, policy: str, module: str = "hbll", **settings: str) -> Iterator[Server]:
    """A server of one model, while it is needed."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HBLL_")}
    environment |= {"HBLL_POLICY": policy, "HBLL_THREADS": "1", "HBLL_MAX_QUEUE_ROWS": "4096", **settings}
    environment |= {"HBLL_MAX_CONNECTIONS": "100000"}  # an overload is to wait in the queue
    command = [sys.executable, "-m", module, "serve", str(models), "--port", str(port)]
    with started(command, environment, f"http://127.0.0.1:{port}/health/ready") as process:
        (model,) = (each["name"] for each in httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["models"])
        yield Server(policy, "127.0.0.1", port, model, process)


@contextmanager
def serve_all(models: Path, policies: Sequence[str], **settings: str) -> Iterator[dict[str, Server]]:
    """A server per policy, all at once: those that are not asked cost no processor time."""
    with ExitStack() as stack:
        yield {policy: stack.enter_context(serve(models, policy, **settings)) for policy in policies}


def _answers(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(url).status_code == 200:
                return True
        time.sleep(0.1)  # another process, which has no other way to tell us
    return False


@dataclass(slots=True, kw_only=True)
class Measured(Shares):
    """What became of the requests of one replay. `late_share` of them the client itself sent too late; `total_s (n,)` is
    what the server says that each took; `status (n,)` that of the answer, or why there is none."""

    policy: str
    cell: str
    seed: int
    late_share: float
    scheduled_s: NDArray[np.float64]
    total_s: NDArray[np.float64]
    status: list[str]

    @property
    def statuses(self) -> Counter[str]:
        """How many requests ended how."""
        return Counter(self.status)

    @property
    def void(self) -> bool:
        """The client itself was too late, too often."""
        return self.late_share > 0.01


class Load:
    """Requests made of test images: which ones, only the seed says."""

    def __init__(self, test: Split) -> None:
        self.transport_s = 0.0
        self.first_in_line = False
        self._bodies = [image.astype("<f4").tobytes() for image in test.x.numpy()]
        self._labels = [str(label) for label in test.labels.tolist()]

    def play(
        self,
        server: Server,
        arrivals: Arrivals,
        budget_s: float,
        cell: str = "",
        seed: int = 0,
        wishes: dict[str, str] | None = None,
    ) -> Measured:
        """Send a trace of one-row requests, answers to which are wanted within this budget. The server is asked for them a
        little earlier, by what the way there and back takes on an idle machine, as a client would that knows its network.
        """
        images = np.random.default_rng(seed).integers(len(self._bodies), size=len(arrivals)).tolist()
        asked_s = max(budget_s - self.transport_s, 0.0001)
        asked = {"latency_budget_ms": f"{1000 * asked_s:.4f}", **(wishes or {})}
        query = "&".join(f"{name}={value}" for name, value in asked.items())
        target = f"/v1/models/{server.model}/predict?{query}".encode()
        requests = [
            Request(at_s, self._bodies[image], target, _CONTENT_TYPE)
            for at_s, image in zip(arrivals.tolist(), images, strict=True)
        ]
        with first_in_line() as self.first_in_line:
            outcomes = run_replay(server.host, server.port, requests, connections=64)
        return self._judge(server.policy, cell, seed, budget_s, outcomes, images)

    def _judge(
        self, policy: str, cell: str, seed: int, budget_s: float, outcomes: Sequence[Outcome], images: Sequence[int]
    ) -> Measured:
        count = len(outcomes)
        measured = Measured(
            budget_s=budget_s,
            depth=np.zeros(count, np.int16),
            right=np.zeros(count, np.bool_),
            latency_s=np.array([outcome.latency_s for outcome in outcomes]),
            policy=policy,
            cell=cell,
            seed=seed,
            late_share=lateness(outcomes),
            scheduled_s=np.array([outcome.scheduled_s for outcome in outcomes]),
            total_s=np.zeros(count),
            status=[outcome.error or str(outcome.status) for outcome in outcomes],
        )
        for place, (outcome, image) in enumerate(zip(outcomes, images, strict=True)):
            if outcome.ok and outcome.body is not None:
                content = json.loads(outcome.body)
                measured.total_s[place] = content["total_ms"] / 1000
                (answer,) = content["predictions"]
                measured.depth[place] = answer["depth"]
                measured.right[place] = answer["label"] == self._labels[image]
        return measured


def shallowest_latency_s(load: Load, server: Server, path: str, requests: int = 300) -> float:
    """Median end-to-end latency of `path` at one client on an idle server; what of it the server did not see, its 0.9
    quantile, is the `transport_s` of `load` from now on."""
    arrivals: Arrivals = 0.02 * np.arange(requests, dtype=np.float64)
    measured = load.play(server, arrivals, 10.0, wishes={"path": path})
    answered = measured.depth > 0
    load.transport_s = float(np.quantile((measured.latency_s - measured.total_s)[answered], 0.9))
    return float(np.median(measured.latency_s[answered]))


def capacity_of(load: Load, server: Server, budget_s: float, highest: float = 8000.0, seconds: float = 4.0) -> float:
    """The highest Poisson rate at which `server` answers 99 % within `budget_s`, to 3 %: by bisection. A rate is too high
    if it failed twice: whatever else runs on the machine for a moment can only make it seem so.

    Raises:
        RuntimeError: all rates were too high, down to a 64th of `highest`.
    """
    lowest = highest / 64
    low, high = lowest, highest
    seeds = itertools.count(1001)

    def answers(rate: float) -> bool:
        seed = next(seeds)
        measured = load.play(server, poisson(rate, seconds, seed), budget_s, seed=seed)
        return measured.attainment >= 0.99 and measured.late_share < 0.05  # else the client is what is measured

    while high / low > 1.03:
        rate = (low * high) ** 0.5
        if answers(rate) or answers(rate):
            low = rate
        else:
            high = rate
    if low == lowest and not (answers(lowest) or answers(lowest)):
        raise RuntimeError(f"{server.policy} does not answer {lowest:g} requests/s within {1000 * budget_s:g} ms here")
    return low
