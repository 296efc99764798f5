"""Rows that wait, in order, each knowing where."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from itertools import count

from service.policy.queues import Key, SortedQueue
from service.policy.state import Place, Row
from service.profile import Segment

_FEW = 64  # entries that are not worth tidying up


class Waiting(SortedQueue[Row]):
    """Rows by a key, least first. `Row.place` is kept up to date."""

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
        row.place = None
        self._group.rows -= 1
        return row

    def take_places(self, places: Iterable[int]) -> list[Row]:
        """See `SortedQueue`."""
        rows = super().take_places(places)
        for row in rows:
            row.place = None
        self._group.rows -= len(rows)
        return rows


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
        for segment in [segment for segment, queue in self.queues.items() if not queue.items]:
            del self.queues[segment]


class Reminders:
    """Waiting rows by another key, least first, each for as long as it waits where it did when it was added.

    A heap. To leave costs a row nothing: what is here of it is dropped when it comes up, or when there is too much of that.
    """

    __slots__ = ("_entries", "_most", "_numbers")

    def __init__(self) -> None:
        self._entries: list[tuple[Key, int, Row, Place | None]] = []
        self._numbers = count()  # so that rows are never compared
        self._most = _FEW

    def __len__(self) -> int:
        """Of rows that left, too, as long as these are here."""
        return len(self._entries)

    def add(self, key: Key, row: Row) -> None:
        """Remember a row that waits."""
        heappush(self._entries, (key, next(self._numbers), row, row.place))
        if len(self._entries) > self._most:
            self._entries = [entry for entry in self._entries if entry[2].place is entry[3]]
            heapify(self._entries)
            self._most = max(_FEW, 2 * len(self._entries))

    def clear(self) -> None:
        """Nobody waits: hold on to none of those that left, and to their inputs."""
        self._entries.clear()
        self._most = _FEW

    def first(self) -> tuple[Key, Row] | None:
        """The least key of a row that still waits, and the row."""
        entries = self._entries
        while entries:
            key, _, row, place = entries[0]
            if row.place is place:
                return key, row
            heappop(entries)
        return None

    def take_before(self, key: Key) -> list[Row]:
        """Forget the rows with a smaller key, and name them in order."""
        entries, taken = self._entries, []
        while entries and entries[0][0] < key:
            _, _, row, place = heappop(entries)
            if row.place is place:
                taken.append(row)
        return taken


def take_out(row: Row) -> None:
    """Out of where it waits."""
    assert row.place is not None
    queue, key = row.place
    queue.remove(key)
