"""Rows that wait, in order, each knowing where."""

from __future__ import annotations

from collections.abc import Iterable

from service.policy.queues import Key, SortedQueue
from service.policy.state import Row
from service.profile import Segment


class Waiting(SortedQueue[Row]):
    """Rows by a key, least first. `Row.place` is kept up to date, and a row that leaves is in no other order any more."""

    __slots__ = ("_group",)

    def __init__(self, group: Group | None = None) -> None:
        super().__init__()
        self._group = group or Group()

    def add(self, key: Key, item: Row) -> None:
        """Into its place."""
        super().add(key, item)
        item.place = self, key
        self._group.rows += 1

    def remove(self, key: Key) -> Row:
        """See `SortedQueue`."""
        row = super().remove(key)
        self._left([row])
        return row

    def take_places(self, places: Iterable[int]) -> list[Row]:
        """See `SortedQueue`."""
        rows = super().take_places(places)
        self._left(rows)
        return rows

    def _left(self, rows: list[Row]) -> None:
        self._group.rows -= len(rows)
        for row in rows:
            row.place = None
            for order, key in row.noted:
                order.remove(key)
            row.noted = ()


class Group:
    """Queues of rows by what these have to run next; `rows` wait in all of them."""

    __slots__ = ("queues", "rows")

    def __init__(self) -> None:
        self.queues: dict[Segment, Waiting] = {}
        self.rows = 0

    def add(self, key: Key, row: Row) -> None:
        """Into its queue."""
        segment = row.rest
        queue = self.queues.get(segment)
        if queue is None:
            queue = self.queues[segment] = Waiting(self)
        queue.add(key, row)

    def drop_empty(self) -> None:
        """Forget the queues in which nobody waits any more."""
        for segment in [segment for segment, queue in self.queues.items() if not queue]:
            del self.queues[segment]


def take_out(row: Row) -> None:
    """Out of where it waits."""
    assert row.place is not None
    queue, key = row.place
    queue.remove(key)


def note(row: Row, order: SortedQueue[Row], key: Key) -> None:
    """Into another order, for as long as it waits where it does."""
    order.add(key, row)
    row.noted = (*row.noted, (order, key))
