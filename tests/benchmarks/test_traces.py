from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.traces import Arrivals, bursts, poisson, ramp, synthetic_day

Trace = Callable[[float, float, int], Arrivals]
TRACES: dict[str, Trace] = {
    "poisson": poisson,
    "regular": lambda rate, duration_s, seed: bursts(rate, 0.25, duration_s, seed),
    "bursts": lambda rate, duration_s, seed: bursts(rate, 8.0, duration_s, seed),
    "ramp": lambda rate, duration_s, seed: ramp(0.0, 2 * rate, duration_s, seed),
    "falling": lambda rate, duration_s, seed: ramp(1.5 * rate, 0.5 * rate, duration_s, seed),
    "synthetic day": synthetic_day,
}

traces = st.sampled_from(sorted(TRACES)).map(TRACES.__getitem__)


@given(traces, st.floats(0.01, 1000.0), st.floats(0.01, 5.0), st.integers(0, 2**32))
def test_arrivals_rise_within_the_duration_and_the_seed_decides(trace, rate, duration_s, seed) -> None:
    times = trace(rate, duration_s, seed)
    assert times.dtype == np.float64
    assert times.ndim == 1
    assert (np.diff(times) >= 0).all()
    assert ((times >= 0) & (times < duration_s)).all()
    assert np.array_equal(times, trace(rate, duration_s, seed))


@pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES)
def test_another_seed_gives_another_trace(trace: Trace) -> None:
    assert not np.array_equal(trace(100.0, 1.0, 1)[:20], trace(100.0, 1.0, 2)[:20])


@pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES)
def test_the_mean_rate_is_the_one_asked_for(trace: Trace) -> None:
    """20 days of 100,000 arrivals; even at CV^2 = 8 their mean has a standard error of 0.2 %."""
    counts = [len(trace(1000.0, 100.0, seed)) for seed in range(20)]
    assert np.mean(counts) == pytest.approx(100_000, rel=0.008)


@pytest.mark.parametrize("cv2", [0.25, 1.0, 2.0, 4.0, 8.0])
def test_gaps_have_the_squared_coefficient_of_variation_asked_for(cv2: float) -> None:
    gaps = np.diff(bursts(1000.0, cv2, 500.0, seed=3))
    assert gaps.mean() == pytest.approx(0.001, rel=0.02)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(cv2, rel=0.03)


def test_bursts_of_cv2_1_are_poisson() -> None:
    assert np.array_equal(poisson(50.0, 10.0, 7), bursts(50.0, 1.0, 10.0, 7))
    counts, _ = np.histogram(poisson(1000.0, 200.0, 7), bins=20_000, range=(0.0, 200.0))
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.04)  # 4 standard errors


@pytest.mark.parametrize(("start_rate", "end_rate"), [(0.0, 2000.0), (300.0, 980.0), (500.0, 500.0), (900.0, 0.0)])
def test_the_rate_of_a_ramp_is_linear(start_rate: float, end_rate: float) -> None:
    times = ramp(start_rate, end_rate, 200.0, seed=5)
    counts, edges = np.histogram(times, bins=20, range=(0.0, 200.0))
    expected = 10 * (start_rate + (end_rate - start_rate) * (edges[:-1] + 5) / 200)
    assert (np.abs(counts - expected) < 4.5 * np.sqrt(expected)).all()


def test_a_synthetic_day_has_a_night_flash_crowds_and_bursts() -> None:
    counts = np.array([np.histogram(synthetic_day(1000.0, 144.0, s), bins=1440, range=(0.0, 144.0))[0] for s in range(20)])
    night, day = counts[:, :240].mean(), counts[:, 600:840].mean()
    assert 1.5 * night < day
    assert np.median(counts.max(axis=1)) > 3 * counts.mean()
    # Poisson counts would have a dispersion of 1.
    assert (counts.var(axis=1) / counts.mean(axis=1) > 10).all()


@settings(max_examples=30)
@given(st.sampled_from([0.0, -1.0, float("inf"), float("nan")]))
def test_impossible_arguments_are_refused(wrong: float) -> None:
    for call in (
        lambda: poisson(wrong, 1.0, 0),
        lambda: poisson(1.0, wrong, 0),
        lambda: bursts(1.0, wrong, 1.0, 0),
        lambda: ramp(1.0, 2.0, wrong, 0),
        lambda: ramp(wrong, wrong, 1.0, 0),
        lambda: synthetic_day(wrong, 1.0, 0),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()
