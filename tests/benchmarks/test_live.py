from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import faults
from benchmarks.faults import lost_before
from benchmarks.live import Load, Measured, Server, capacity_of, only_bundle, started
from family.manifest import BundleError


def server() -> Server:
    """This process."""
    return Server("slackfit", "127.0.0.1", 9, "m", SimpleNamespace(pid=os.getpid()))  # type: ignore[arg-type]


def measured(status: list[str]) -> Measured:
    count = len(status)
    return Measured(
        budget_s=1.0,
        depth=np.array([each == "200" for each in status], np.int16),
        right=np.zeros(count, np.bool_),
        latency_s=np.zeros(count),
        policy="",
        cell="",
        seed=0,
        late_share=0.0,
        scheduled_s=np.arange(count, dtype=np.float64),
        total_s=np.zeros(count),
        status=status,
    )


class Playing(Load):
    """Every request ends like this."""

    def __init__(self, status: str) -> None:
        self.status = status

    def play(self, *_: Any, **__: Any) -> Measured:
        return measured([self.status] * 3)


def test_a_server_that_does_not_start_is_told_with_its_last_words() -> None:
    """Bug found: they were thrown away."""
    command = [sys.executable, "-c", "print('x' * 9999, 'why'); raise SystemExit(3)"]
    with (
        pytest.raises(RuntimeError, match=r"status 3\nx{3000,4000} why") as caught,
        started(command, os.environ, "http://127.0.0.1:9"),
    ):
        pass
    assert len(str(caught.value)) < 4200


def test_a_folder_of_one_bundle_may_hold_other_files(tmp_path: Path) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "notes.txt").touch()
    with pytest.raises(BundleError, match="is no bundle"):  # that one is looked at
        only_bundle(tmp_path)
    (tmp_path / "m" / "2").mkdir()
    with pytest.raises(BundleError, match=r"expected one bundle, MODEL/VERSION, got 2"):
        only_bundle(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_memory_is_in_units_of_a_million_bytes() -> None:
    """Bug found: it was in units of 1,024,000."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (kibibytes,) = (int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    assert server().memory_mb == pytest.approx(kibibytes * 1024 / 1e6, rel=0.01)


def test_refused_requests_are_not_lost() -> None:
    """Bug found: after SIGTERM those that were refused counted as lost."""
    replay = measured(["200", "504", "the connection was lost", "no connection"])
    assert lost_before(replay) == 2
    assert lost_before(replay, until_s=3.0) == 1


def test_what_goes_wrong_with_a_fault_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug found: the report told of a fault that had not been done."""
    monkeypatch.setattr(faults, "_HARM_S", 0.0)

    def harm() -> None:
        raise OSError("could not")

    with pytest.raises(OSError, match="could not"):
        faults._while(Playing("200"), server(), budget_s=1.0, rate=1.0, seconds=1.0, harm=harm)


def test_a_capacity_is_one_that_was_seen() -> None:
    """Bug found: of a server that answers nothing in time it was the lowest rate that would have been tried."""
    assert capacity_of(Playing("200"), server(), 1.0, highest=640.0) == pytest.approx(640, rel=0.03)
    with pytest.raises(RuntimeError, match="slackfit does not answer 10 requests/s within 1000 ms"):
        capacity_of(Playing("504"), server(), 1.0, highest=640.0)


def test_the_lowest_rate_is_tried_as_often_as_the_others() -> None:
    """Bug found: it was too high after one failure, which anything else on the machine could cause."""
    played: list[float] = []

    class Counted(Playing):
        def play(self, *_: Any, **options: Any) -> Measured:
            played.append(options["seed"])
            return super().play()

    with pytest.raises(RuntimeError, match="slackfit does not answer"):
        capacity_of(Counted("504"), server(), 1.0, highest=640.0)
    assert len(played) == len(set(played))
    assert len(played) % 2 == 0, "each rate twice"
