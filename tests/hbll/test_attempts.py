from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbll.client.attempts import Attempts
from hbll.client.errors import DeadlineExceeded, HbllError, InvalidRequest, Refused, ServerFailed, Unavailable
from tests.fakes import FakeClock

ROUNDING_S = 1e-9
"""Of sums in another order than theirs."""

seconds = st.floats(0, 3, allow_subnormal=False)
refusals = st.builds(lambda after_s: Refused("full", retry_after_s=after_s), st.none() | seconds)
failures = st.tuples(seconds, refusals | st.just(Unavailable("gone")) | st.just(ServerFailed("a bug")))


@given(
    timeout_s=st.floats(0.01, 10),
    budget_ms=st.none() | st.floats(0.01, 10_000),
    retries=st.integers(0, 8),
    course=st.lists(st.tuples(failures, st.floats(0, 1)), min_size=9, max_size=9),
)
def test_no_wait_passes_the_deadline_and_no_request_is_given_more_than_is_left(
    timeout_s: float, budget_ms: float | None, retries: int, course: list[tuple[tuple[float, HbllError], float]]
) -> None:
    """A call in simulated time: every request fails after a while, until the call is over or gives up."""
    clock = FakeClock()
    started_s = clock()
    attempts = Attempts(started_s, timeout_s, budget_ms, retries)
    budgets: list[float | None] = []
    waited_s = 0.0
    for (took_s, error), jitter in course:
        left_ms = attempts.budget_left_ms(clock())
        spent_ms = 1000 * (clock() - started_s)
        assert (left_ms is None) == (budget_ms is None)
        if left_ms is not None:
            assert budget_ms is not None
            assert 0 < left_ms <= budget_ms - spent_ms + 1000 * ROUNDING_S
            assert not budgets or left_ms <= budgets[-1]
        budgets.append(left_ms)
        clock.now_s += took_s
        wait_s = attempts.wait_s(error, clock(), jitter)
        if wait_s is None:
            break
        assert error.transient
        assert wait_s >= (error.retry_after_s or 0)
        waited_s += wait_s
        clock.now_s += wait_s
        assert clock() < started_s + timeout_s + ROUNDING_S
        assert budget_ms is None or clock() < started_s + budget_ms / 1000 + ROUNDING_S
    else:
        pytest.fail("more requests than retries and one")
    assert len(budgets) <= retries + 1
    assert waited_s < timeout_s + ROUNDING_S


def test_waits_double_to_a_limit_and_jitter_takes_any_share_of_them() -> None:
    attempts = Attempts(0.0, 1e6, None, retries=100)
    waits = [attempts.wait_s(Unavailable("gone"), 0.0, jitter=1.0) for _ in range(8)]
    assert waits == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert attempts.wait_s(Unavailable("gone"), 0.0, jitter=0.0) == 0
    assert attempts.wait_s(Refused("full", retry_after_s=7), 0.0, jitter=0.5) == 8


def test_what_stays_wrong_is_not_tried_again() -> None:
    attempts = Attempts(0.0, 10.0, None, retries=3)
    for error in (InvalidRequest("no"), ServerFailed("a bug"), DeadlineExceeded("late")):
        assert attempts.wait_s(error, 0.0, 0.5) is None


def test_a_spent_budget_is_told_instead_of_sent() -> None:
    attempts = Attempts(10.0, 60.0, 5.0, retries=3)
    assert attempts.budget_left_ms(10.002) == pytest.approx(3)
    with pytest.raises(DeadlineExceeded, match="the budget of 5 ms was spent"):
        attempts.budget_left_ms(10.005)
    assert attempts.left_s(80.0) == 0
