"""Rows that wait, in order, each knowing where."""

from __future__ import annotations

from collections.abc import Iterable

from service.policy.queues import Key, SortedQueue
from service.policy.state import Row
from service.profile import Segment


class Waiting(SortedQueue[Row]):
    """Rows by a key, least first."""

    __slots__ = ()

    def add(self, key: Key, item: Row) -> None:
        """Into its place."""
        super().add(key, item)
        item.place = self, key

    def take_places(self, places: Iterable[int]) -> list[Row]:
        """Take the rows of these rising places out."""
        rows = super().take_places(places)
        for row in rows:
            _moves(row)
        return rows


Queues = dict[Segment, Waiting]
"""By what their rows have to run next."""


def take_out(row: Row) -> None:
    """Out of where it waits."""
    assert row.place is not None
    queue, key = row.place
    queue.remove(key)
    _moves(row)


def length(queues: Queues) -> int:
    """How many rows wait in all of them."""
    return sum(map(len, queues.values()))


def drop_empty(queues: Queues) -> None:
    """Forget the queues in which nobody waits any more."""
    for segment in [segment for segment, queue in queues.items() if not queue]:
        del queues[segment]


def _moves(row: Row) -> None:
    row.place = None
    row.turn += 1
