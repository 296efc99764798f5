"""What happens to requests when things go wrong: real faults, done to a real server under load.

python -m benchmarks.faults [models-folder] [--out docs/bench/faults.md]
"""

from __future__ import annotations

import math
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.live import DEFAULT_MODELS, Load, Measured, Server, only_bundle, serve, shallowest_latency_s
from benchmarks.outcomes import digits_of
from benchmarks.traces import poisson
from family.tree import format_path
from service.errors import ClientGone
from service.policy import DEFAULT_POLICY
from training.checkpoint import write_atomically

_BUDGET = 30
_HARM_S = 2.0
_GONE = f'hbll_refusals_total{{code="{ClientGone.code}"}}'


@dataclass(frozen=True, slots=True)
class Outcome:
    """One line of the report."""

    fault: str
    seen: str
    lost: int
    memory_mb: tuple[float, float]


@click.command()
@click.argument("models", type=click.Path(path_type=Path, exists=True, file_okay=False), default=DEFAULT_MODELS)
@click.option("--rate", default=400.0, show_default=True, help="Requests a second.")
@click.option("--hog-s", default=20.0, show_default=True, help="For how long a core is hogged.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="A Markdown file for the report.")
def main(models: Path, rate: float, hog_s: float, out: Path | None) -> None:
    """Do harm to a server of the folder MODELS, and report what became of the requests."""
    _, manifest = only_bundle(models)
    load = Load(digits_of(manifest))
    with serve(models, DEFAULT_POLICY, module="benchmarks.faulty") as server:
        budget_s = _BUDGET * shallowest_latency_s(load, server, format_path(manifest.front[0]))
        load.play(server, poisson(rate, 3, 0), budget_s)  # so that memory is what serving needs
        outcomes = [
            _hogged(load, server, budget_s, rate, hog_s),
            _thread_killed(load, server, budget_s, rate),
            _half_bodies(load, server, budget_s, rate),
            _leavers(load, server, budget_s, rate),
        ]
    with serve(models, DEFAULT_POLICY, module="benchmarks.faulty") as server:
        outcomes.append(_terminated(load, server, budget_s, rate))
    report = _report(outcomes, rate, budget_s)
    Console().print(Markdown(report))
    if out is not None:
        write_atomically(out, report.encode())


def _while(load: Load, server: Server, budget_s: float, rate: float, seconds: float, harm: Callable[[], None]) -> Measured:
    """A replay, and `harm` in a thread two seconds after its start; what goes wrong there is raised here."""

    def later() -> None:
        time.sleep(_HARM_S)
        harm()

    with ThreadPoolExecutor(1) as thread:
        harmed = thread.submit(later)
        measured = load.play(server, poisson(rate, seconds, 1), budget_s)
        harmed.result()
    return measured


def _line(fault: str, server: Server, before_mb: float, measured: Measured, more: str = "") -> Outcome:
    seen = ", ".join(f"{count} x {status}" for status, count in measured.statuses.most_common())
    seen += f"; {100 * measured.attainment:.2f} % in time, mean depth {measured.mean_depth:.2f}{more}"
    time.sleep(1)  # lets the last connections close before memory is read
    return Outcome(fault, seen, lost_before(measured), (before_mb, server.memory_mb))


def lost_before(measured: Measured, until_s: float = math.inf) -> int:
    """How many of the requests that were due before `until_s` got no answer of any status."""
    due = zip(measured.status, measured.scheduled_s, strict=True)
    return sum(not status.isdecimal() and at_s < until_s for status, at_s in due)


def _hogged(load: Load, server: Server, budget_s: float, rate: float, hog_s: float) -> Outcome:
    before_mb = server.memory_mb
    ratios: dict[str, float] = {}

    def sample(name: str) -> None:
        ratios[name] = server.get(f"/v1/models/{server.model}/plan?depth=1")["expected_ms"]

    def harm() -> None:
        sample("before")
        hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
        try:
            time.sleep(hog_s / 2)
            sample("during")
            time.sleep(hog_s / 2)
        finally:
            for hog in hogs:
                hog.kill()
                hog.wait()

    measured = _while(load, server, budget_s, rate, hog_s + 6, harm)
    load.play(server, poisson(rate, 3, 2), budget_s)
    sample("after")
    shown = ", ".join(f"{value:.2f} ms {name}" for name, value in ratios.items())
    return _line(f"two processes spin for {hog_s:g} s", server, before_mb, measured, f"; one block expected in {shown}")


def _thread_killed(load: Load, server: Server, budget_s: float, rate: float) -> Outcome:
    before_mb = server.memory_mb

    def harm() -> None:
        for _ in range(5):
            server.process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)

    measured = _while(load, server, budget_s, rate, 6, harm)
    deaths = server.metric("hbll_worker_deaths_total")
    return _line("inference thread killed, five times", server, before_mb, measured, f"; {deaths:g} deaths noticed")


def _half_bodies(load: Load, server: Server, budget_s: float, rate: float) -> Outcome:
    before_mb = server.memory_mb

    def harm() -> None:
        for _ in range(200):
            with socket.create_connection((server.host, server.port)) as half:
                half.sendall(_post(server, "", 3136) + bytes(1000))

    measured = _while(load, server, budget_s, rate, 6, harm)
    return _line("200 clients send half a body and go", server, before_mb, measured)


def _leavers(load: Load, server: Server, budget_s: float, rate: float) -> Outcome:
    before_mb, before = server.memory_mb, server.metric(_GONE)
    body = np.zeros((28, 28), np.float32).tobytes()

    def harm() -> None:
        sockets = [socket.create_connection((server.host, server.port)) for _ in range(500)]
        for each in sockets:
            each.sendall(_post(server, "?min_confidence=1", len(body)) + body)
        for each in sockets:
            each.close()

    measured = _while(load, server, budget_s, rate, 6, harm)
    gone = server.metric(_GONE) - before
    return _line("500 clients ask and disconnect at once", server, before_mb, measured, f"; {gone:g} of them left in time")


def _terminated(load: Load, server: Server, budget_s: float, rate: float) -> Outcome:
    before_mb = server.memory_mb
    measured = _while(load, server, budget_s, rate, 4, lambda: server.process.send_signal(signal.SIGTERM))
    status = server.process.wait(timeout=30)
    at_s = measured.scheduled_s[measured.depth > 0].max()
    errors = {status: count for status, count in measured.statuses.items() if status != "200"}
    lost = lost_before(measured, at_s)  # of when the signal came the replay's clock knows nothing
    return Outcome(
        "SIGTERM under load",
        f"exit status {status}; the last answer went to a request of {at_s:.2f} s; later ones: {errors}",
        lost,
        (before_mb, 0.0),
    )


def _post(server: Server, query: str, length: int) -> bytes:
    """The head of a request with a raw body."""
    lines = (f"POST /v1/models/{server.model}/predict{query} HTTP/1.1", "Host: x", f"Content-Length: {length}")
    return "\r\n".join((*lines, "Content-Type: application/octet-stream", "", "")).encode()


def _report(outcomes: list[Outcome], rate: float, budget_s: float) -> str:
    lines = [
        f"Poisson arrivals, {rate:g} requests/s, budget {1000 * budget_s:.1f} ms. Lost: neither answered nor refused.",
        "",
        "| fault, from 2 s on | what clients saw | lost | memory before, after (PSS, MB) |",
        "|---|---|---|---|",
    ]
    for each in outcomes:
        before, after = each.memory_mb
        lines.append(f"| {each.fault} | {each.seen} | {each.lost} | {before:.0f}, {f'{after:.0f}' if after else 'ended'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
