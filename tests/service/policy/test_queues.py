from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from service.policy.queues import Key, SortedQueue


class SortedQueueBehavesLikeASortedList(RuleBasedStateMachine):
    """The model is a dict that is sorted whenever it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: SortedQueue[object] = SortedQueue()
        self.model: dict[Key, object] = {}

    @property
    def keys(self) -> list[Key]:
        return sorted(self.model)

    @rule(due=st.integers(0, 5), order=st.integers(0, 50))
    def add(self, due: int, order: int) -> None:
        key = (float(due), order)
        if key not in self.model:
            self.model[key] = object()
            self.queue.add(key, self.model[key])

    @rule(key=st.tuples(st.integers(0, 5).map(float), st.integers(0, 50)))
    def remove(self, key: Key) -> None:
        if self.model.pop(key, None) is not None:
            self.queue.remove(key)
        else:
            with pytest.raises(KeyError):
                self.queue.remove(key)

    @rule(places=st.sets(st.integers(0, 20)))
    def take_places(self, places: set[int]) -> None:
        there = sorted(place for place in places if place < len(self.model))
        expected = [self.model[self.keys[place]] for place in there]
        gone = [self.keys[place] for place in there]
        assert self.queue.take_places(iter(there)) == expected
        for key in gone:
            del self.model[key]

    @rule(due=st.integers(-1, 6))
    def look(self, due: int) -> None:
        key = (float(due),)
        below = [each for each in self.keys if each < key]
        assert self.queue.below(key) == len(below)

    @invariant()
    def is_in_order(self) -> None:
        assert len(self.queue) == len(self.model)
        assert self.queue.keys == self.keys
        assert self.queue.items == [self.model[key] for key in self.keys]


SortedQueueBehavesLikeASortedList.TestCase.settings = settings(max_examples=30, stateful_step_count=30)
test_a_sorted_queue_behaves_like_a_sorted_list = SortedQueueBehavesLikeASortedList.TestCase
