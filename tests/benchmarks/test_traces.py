from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.traces import Arrivals, azure_functions, bursts, poisson, ramp, synthetic_day

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


def write_azure(file: Path, rows: list[list[object]], minutes: int = 1440) -> Path:
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["HashOwner", "HashApp", "HashFunction", "Trigger", *range(1, minutes + 1)])
        writer.writerows(rows)
    return file


@pytest.fixture
def azure_day(tmp_path: Path) -> Path:
    """Two functions: one a minute without rest, and one that runs in the second half of the day, three a minute."""
    steady = ["o1", "a1", "f1", "timer", *[1] * 1440]
    late = ["o2", "a2", "f2", "http", *[0] * 720, *[3] * 720]
    return write_azure(tmp_path / "day.csv", [steady, late])


def test_azure_functions_are_summed_scaled_and_squeezed(azure_day: Path) -> None:
    times = azure_functions(azure_day, rate=1000.0, duration_s=100.0, seed=1)
    assert (np.diff(times) >= 0).all()
    assert ((times >= 0) & (times < 100.0)).all()
    assert len(times) == pytest.approx(100_000, abs=4 * 100_000**0.5)
    first, second = (times < 50.0).sum(), (times >= 50.0).sum()
    assert second / first == pytest.approx(4.0, rel=0.05)
    assert np.array_equal(times, azure_functions(azure_day, rate=1000.0, duration_s=100.0, seed=1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected the columns HashOwner, HashApp, HashFunction, Trigger, 1, ..., 1440"),
        ("a,b\n1,2\n", "expected the columns HashOwner"),
        (b"\xff\xfe\x00", "is not a CSV file in UTF-8"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    file = tmp_path / "other.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        azure_functions(file, 1.0, 1.0, 0)
    assert "other.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["o", "a", "f", "http", *[1] * 1439], "line 2: expected 1444 columns, got 1443"),
        (["o", "a", "f", "http", *[1] * 1439, "many"], "line 2: a count of invocations is not a number"),
        (["o", "a", "f", "http", *[1] * 1439, -1], "line 2: a count of invocations is negative or not finite"),
        (["o", "a", "f", "http", *[0] * 1440], "holds no invocations"),
    ],
)
def test_a_damaged_azure_file_is_refused_by_line(tmp_path: Path, row: list[object], message: str) -> None:
    file = write_azure(tmp_path / "day.csv", [row])
    with pytest.raises(ValueError, match=message):
        azure_functions(file, 1.0, 1.0, 0)


def test_a_file_of_fewer_minutes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the columns"):
        azure_functions(write_azure(tmp_path / "day.csv", [], minutes=60), 1.0, 1.0, 0)


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
