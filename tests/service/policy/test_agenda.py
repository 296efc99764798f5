"""How long batches can be kept waiting: the same as by counting one after another."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.policy.agenda import Agenda, Due

batches = st.lists(st.tuples(st.floats(0, 10), st.floats(0, 2)), max_size=12)


def one_after_another(batches: list[Due], start_s: float) -> float:
    spare_s = math.inf
    for due_s, took_s in sorted(batches):
        start_s += took_s
        spare_s = min(spare_s, due_s - start_s)
    return spare_s


@given(batches, batches, st.floats(0, 10))
def test_all_are_in_time_by_the_earliest_deadline_first(some: list[Due], more: list[Due], start_s: float) -> None:
    expected = one_after_another(some + more, start_s)
    assert Agenda(some).spare_s(start_s, sorted(more)) == pytest.approx(expected, abs=1e-9)


def test_nothing_to_do_can_wait_for_ever() -> None:
    assert Agenda(()).spare_s(5.0) == math.inf


def test_it_says_by_how_much_one_will_be_late() -> None:
    assert Agenda([(1.0, 3.0)]).spare_s(0.5) == pytest.approx(-2.5)
    assert Agenda([(10.0, 1.0)]).spare_s(0.0, [(1.0, 3.0)]) == pytest.approx(-2.0)
