from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cells import LIVE
from benchmarks.simulation import Report
from benchmarks.validation import Compared, compare_with

CELL = LIVE[0]
HEAD = "cell,policy,seed,requests,void,goodput,attainment,depth,p50_ms,p95_ms,p99_ms\n"
ABOUT = {"capacity": 1000.0, "requests": 300, "shallowest_latency_ms": 2.0}


def write(folder: Path, *lines: str, about: dict[str, float] = ABOUT) -> Path:
    (folder / "bench.json").write_text(json.dumps(about))
    (folder / "bench.csv").write_text(HEAD + "".join(f'"{CELL.name}",{line}\n' for line in lines))
    return folder


def test_the_same_arrivals_within_the_same_budgets_are_simulated(tmp_path: Path) -> None:
    played = []

    def play(arrivals_s, budget_s, policy, *, servers, seed) -> Report:
        played.append((arrivals_s.tolist(), budget_s, policy, servers, seed))
        late = np.full(len(arrivals_s), np.inf)
        return Report(budget_s, np.ones(len(arrivals_s), np.int16), np.zeros(len(arrivals_s), np.bool_), late)

    folder = write(
        tmp_path,
        "ladder-edf,3,290,False,0.8,0.99,3,5,9,11",
        "slackfit,3,290,True,0.8,0.5,3,5,9,11",  # void
    )
    assert list(compare_with(play, folder)) == [Compared(CELL.name, "ladder-edf", 3, measured=0.99, simulated=0.0)]
    assert played == [(CELL.arrivals(1000.0, 300, 3).tolist(), CELL.deadline * 0.002, "ladder-edf", 1, 3)]


@pytest.mark.parametrize(
    ("line", "about"),
    [("ladder-edf,3,290,False,0.8", ABOUT), ("ladder-edf,3,290,False,0.8,0.99,3,5,9,11", {"capacity": 1000.0})],
)
def test_files_of_something_else_are_refused(tmp_path: Path, line: str, about: dict[str, float]) -> None:
    folder = write(tmp_path, line, about=about)
    with pytest.raises(ValueError, match="as `hbll bench --out` writes them"):
        list(compare_with(lambda *_, **__: pytest.fail("played"), folder))


def test_a_bench_whose_replays_are_all_void_is_refused(tmp_path: Path) -> None:
    """Bug found: the table was empty, and the mean difference no number."""
    folder = write(tmp_path, "slackfit,3,290,True,0.8,0.5,3,5,9,11")
    with pytest.raises(ValueError, match="expected a replay that is not void"):
        list(compare_with(lambda *_, **__: pytest.fail("played"), folder))
