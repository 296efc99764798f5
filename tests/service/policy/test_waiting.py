from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from service.policy.state import Row
from service.policy.waiting import Reminders, Waiting, take_out
from service.policy.wish import Wish


class RemindersKnowWhoStillWaits(RuleBasedStateMachine):
    """The model is a dict of the rows that wait where they did when they were noted, by key."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = Waiting()
        self.reminders = Reminders()
        self.model: dict[Row, float] = {}
        self.left: list[Row] = []

    @rule(key=st.floats(0, 5), again=st.booleans())
    def add(self, key: float, again: bool) -> None:
        """A new row, or one that left and waits again."""
        row = self.left.pop() if again and self.left else Row(Wish(), 0.0, len(self.model) + len(self.left))
        self.waiting.add((key, row.order), row)
        self.reminders.add((key,), row)
        self.model[row] = key

    @rule(place=st.integers(0, 200))
    def leave(self, place: int) -> None:
        if self.model:
            row = list(self.model)[place % len(self.model)]
            take_out(row)
            del self.model[row]
            self.left.append(row)

    @rule(until=st.floats(0, 5))
    def take_before(self, until: float) -> None:
        taken = self.reminders.take_before((until,))
        keys = [self.model.pop(row) for row in taken]
        assert keys == sorted(keys)
        assert all(key < until for key in keys)
        assert all(key >= until for key in self.model.values())
        for row in taken:
            take_out(row)
        self.left += taken

    @rule(rows=st.integers(1, 100))
    def come_and_go(self, rows: int) -> None:
        """So many that the reminders tidy up."""
        passing = [Row(Wish(), 0.0, 10**6 + number) for number in range(rows)]
        for row in passing:
            self.waiting.add((9.0, row.order), row)
            self.reminders.add((9.0,), row)
        assert self.waiting.take_places(range(len(self.model), len(self.model) + rows)) == passing

    @invariant()
    def the_first_is_the_least(self) -> None:
        first = self.reminders.first()
        assert (first[0][0] if first else None) == min(self.model.values(), default=None)
        assert first is None or self.model[first[1]] == first[0][0]


RemindersKnowWhoStillWaits.TestCase.settings = settings(max_examples=50, stateful_step_count=40)
test_reminders_know_who_still_waits = RemindersKnowWhoStillWaits.TestCase


def test_reminders_of_rows_that_left_do_not_pile_up() -> None:
    waiting, reminders = Waiting(), Reminders()
    for order in range(10_000):
        row = Row(Wish(), 0.0, order)
        waiting.add((1.0, order), row)
        reminders.add((1.0, order), row)
        take_out(row)
    assert len(reminders) <= 64
