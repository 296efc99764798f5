from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from benchmarks.bound import taut_string, upper_bound, value_of_time
from benchmarks.simulation import Hardware, Outcomes, simulate
from benchmarks.traces import bursts
from service.policy import make_policy
from service.policy.state import Offer
from service.profile import LatencyProfile
from tests.fakes import fake_parts

gaps = st.lists(st.floats(0.01, 3), min_size=1, max_size=6)


def tube(steps: list[float], budget: float) -> tuple[np.ndarray, np.ndarray, float]:
    arrivals = np.cumsum(np.minimum(steps, budget))  # longer pauses divide the schedule
    return np.append(arrivals[1:], -np.inf), arrivals + budget, float(arrivals[0])


@given(gaps, st.floats(0.1, 5))
def test_the_string_stays_in_the_tube_and_rises(steps, budget) -> None:
    lower, upper, start = tube(steps, budget)
    ends = taut_string(lower, upper, start)
    assert (ends <= upper + 1e-9).all()
    assert (ends >= lower - 1e-9).all()
    assert (np.diff(ends, prepend=start) >= -1e-9).all()
    assert abs(ends[-1] - upper[-1]) < 1e-9


@settings(max_examples=40)
@given(gaps, st.floats(0.1, 5))
def test_no_other_schedule_has_a_greater_sum_of_a_concave_value(steps, budget) -> None:
    lower, upper, start = tube(steps, budget)

    def cost(ends: np.ndarray) -> float:
        steps = np.diff(ends, prepend=start)
        return float(100 * np.maximum(-steps, 0).sum() - np.sqrt(np.maximum(steps, 0) + 1e-6).sum())

    ours = cost(taut_string(lower, upper, start))
    bounds = list(zip(np.maximum(lower, start), upper, strict=True))
    found = minimize(cost, [high for _, high in bounds], bounds=bounds, method="L-BFGS-B")
    assert ours <= found.fun + 1e-3


def outcomes(inputs: int = 400) -> Outcomes:
    """Deeper answers are right more often, and confidence tells which."""
    rng = np.random.default_rng(0)
    hardness = rng.random(inputs)
    accuracies = {(4,): 0.7, (4, 6): 0.85, (4, 6, 7): 0.9}
    right = {path: hardness < accuracy for path, accuracy in accuracies.items()}
    confidence = {
        path: np.clip(np.where(right[path], 0.9, 0.45) + 0.1 * rng.standard_normal(inputs), 0.1, 1) for path in accuracies
    }
    return Outcomes({p: c.tolist() for p, c in confidence.items()}, {p: r.tolist() for p, r in right.items()})


def test_value_rises_and_is_concave_up_to_the_best_that_any_path_reaches() -> None:
    seconds, value = value_of_time(outcomes(), LatencyProfile(fake_parts(batches=(1, 8), block_s=0.001)))
    assert (seconds[0], value[0]) == (0, 0)
    slopes = np.diff(value) / np.diff(seconds)
    assert (slopes > 0).all()
    assert (np.diff(slopes) < 1e-9).all()
    assert value[-1] >= np.mean(outcomes().right[4, 6, 7])


def test_no_policy_beats_the_bound_by_more_than_chance() -> None:
    climb = ((4,), (4, 6), (4, 6, 7))
    accuracies = {path: float(np.mean(right)) for path, right in outcomes().right.items()}
    for rate in (300, 900, 2000):
        arrivals = bursts(rate, 4, 6000 / rate, seed=1)

        def make() -> tuple[object, Offer]:
            offer = Offer(climb, climb, accuracies, LatencyProfile(fake_parts(batches=(1, 2, 4, 8), block_s=0.001)))
            return make_policy("ladder-edf", offer), offer

        got = simulate(arrivals, 0.02, outcomes(), make, hardware=Hardware(jitter=0.05)).goodput  # type: ignore[arg-type]
        profile = LatencyProfile(fake_parts(batches=(1, 2, 4, 8), block_s=0.001))
        bound = upper_bound(arrivals, 0.02, *value_of_time(outcomes(), profile))
        assert got <= bound + 0.02
