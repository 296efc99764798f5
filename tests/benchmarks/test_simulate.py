from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.simulate import World, split_names
from benchmarks.simulation import Hardware


@dataclass(frozen=True)
class Machine(World):
    """Answers `most` requests a second in time, and all of one more too late."""

    most: float

    @property
    def shallowest_s(self) -> float:
        return 0.01

    def play(self, arrivals_s, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(attainment=1.0 if len(arrivals_s) / arrivals_s[-1] <= self.most else 0.0)


def machine(most: float) -> Machine:
    offer: Any = SimpleNamespace(front=((4,),))
    nothing: Any = None
    return Machine(offer, nothing, nothing, Hardware(), nothing, most)


def test_a_capacity_is_one_that_was_seen() -> None:
    """Bug found: where no rate was answered in time it was the lowest that had been tried."""
    assert machine(1000.0).capacity() == pytest.approx(1000, rel=0.03)
    with pytest.raises(ValueError, match=r"aimd\(4\) does not answer 99 % of 12 requests/s within 300.0 ms"):
        machine(10.0).capacity()


def test_policies_are_named_once_and_at_least_one() -> None:
    assert split_names(" cheapest, slackfit,,cheapest") == ["cheapest", "slackfit"]
    with pytest.raises(ValueError, match="expected names with commas between them, got ' ,'"):
        split_names(" ,")
