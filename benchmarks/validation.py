"""The simulator against real servers: the traces of `hbll bench` played once more, in simulated time."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.cells import LIVE
from benchmarks.simulation import Report
from benchmarks.traces import Arrivals

_CELLS = {cell.name: cell for cell in LIVE}


class Play(Protocol):
    """Simulates a trace."""

    def __call__(self, arrivals_s: Arrivals, budget_s: float, policy: str, *, servers: int, seed: int) -> Report:
        """See `World.play`."""
        ...


@dataclass(frozen=True, slots=True)
class Compared:
    """One replay: the share of its arrivals answered in time, on a real server and in the simulator."""

    cell: str
    policy: str
    seed: int
    measured: float
    simulated: float


def compare_with(play: Play, folder: Path) -> Iterator[Compared]:
    """Simulate every replay of `folder` that is not void: the same arrivals, images and budgets.

    Raises:
        OSError: its files cannot be read.
        ValueError: they are not what `hbll bench --out` writes, or all of its replays are void.
    """
    try:
        about = json.loads((folder / "bench.json").read_text())
        capacity, requests = float(about["capacity"]), int(about["requests"])
        latency_s = float(about["shallowest_latency_ms"]) / 1000
        with (folder / "bench.csv").open(newline="") as opened:
            rows = [row for row in csv.DictReader(opened) if row["void"] == "False"]
        replays = [(_CELLS[row["cell"]], row["policy"], int(row["seed"]), float(row["attainment"])) for row in rows]
    except (KeyError, TypeError, json.JSONDecodeError) as exc:
        raise ValueError(f"{folder}: expected bench.csv and bench.json as `hbll bench --out` writes them: {exc!r}") from exc
    if not replays:
        raise ValueError(f"{folder}: expected a replay that is not void, got none")
    for cell, policy, seed, measured in replays:
        arrivals = cell.arrivals(capacity, requests, seed)
        report = play(arrivals, cell.deadline * latency_s, policy, servers=1, seed=seed)
        yield Compared(cell.name, policy, seed, measured, report.attainment)
