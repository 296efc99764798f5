from __future__ import annotations

import pytest

from service.profile import LatencyProfile, Segment, measure_profile
from tests.fakes import FakeClock

ONE, TWO = Segment((4,), embed=True), Segment((4, 6), embed=True)


def test_latency_is_a_high_quantile_of_what_was_measured() -> None:
    clock, calls = FakeClock(), []

    def run(segment: Segment, rows: int) -> None:
        calls.append((segment, rows))
        slow = 5 if len(calls) % 10 == 0 else 1  # a hiccup every tenth run
        clock.now_s += 0.001 * len(segment.nodes) * rows * slow

    profile = measure_profile(run, [ONE, TWO], max_batch=8, clock=clock)
    assert profile.batches == (1, 4, 8)
    assert 0.001 <= profile.latency_s(ONE, 1) < 0.005
    assert profile.latency_s(TWO, 1) >= 2 * 0.001
    assert profile.latency_s(ONE, 8) >= 8 * 0.001


def test_between_profiled_batches_the_next_larger_counts() -> None:
    profile = LatencyProfile({(ONE, 1): 1.0, (ONE, 4): 2.0}, (1, 4))
    assert [profile.latency_s(ONE, rows) for rows in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 2, 2, 4, 4, 6]
    with pytest.raises(KeyError):
        profile.latency_s(TWO, 1)
