"""Rows with an answer that may go deeper: which batch of them gains most, and when it is too late for one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from heapq import merge
from itertools import islice
from typing import NamedTuple

from service.policy.price import Price
from service.policy.state import Decision, Offer, Row
from service.policy.waiting import Group, Reminders, Waiting, take_out
from service.profile import Segment

_MOST_BATCHES = 8  # of rows that wait for a better answer


class BestBatch(NamedTuple):
    """Rows at the first `most` of these places of a queue: their expected gain per second, and how long a run may be."""

    rate: float
    segment: Segment
    queue: Waiting
    places: list[int]
    most: int
    limit_s: float

    def take(self) -> list[Row]:
        """Take them out."""
        return self.queue.take_places(self.places[: self.most])


class DeeperWork:
    """Rows by what they would run next, highest gain first."""

    def __init__(self, offer: Offer, price: Price) -> None:
        self._offer = offer
        self._price = price
        self._most_rows = _MOST_BATCHES * offer.profile.max_batch
        self.waiting = Group()
        self._until = Reminders()  # by when it is too late for them
        self._may_let_go = False  # whether some may be without a wish

    def add(self, row: Row, until_s: float) -> None:
        """A row that has an answer waits for a better one, for which it is too late after `until_s`."""
        assert row.answered is not None
        gain = self._offer.gain(row.answered, row.target, row.confidence)
        self.waiting.add((-gain, row.order), row)
        self._until.add((math.nextafter(until_s, math.inf), row.order), row)
        if row.wish.exit_at is None:
            self._may_let_go = True

    def idle(self) -> None:
        """Nobody waits."""
        self._until.clear()

    def wake_s(self) -> float:
        """From when on it is too late for some row; infinity for never."""
        first = self._until.first()
        return first[0][0] if first else math.inf

    def take_late(self, until_s: float) -> list[Row]:
        """Take those out for which it is too late at `until_s`."""
        late = self._until.take_before((until_s, math.inf))
        for row in late:
            take_out(row)
        return late

    def answer(self, row: Row, decision: Decision) -> None:
        """The latest answer of a row is final, for lack of time."""
        assert row.answered is not None
        if row.wish.exit_at is None:
            self._price.given_up(row.answered, row.target, row.confidence)
        decision.done.append((row, "load"))

    def let_go(self, decision: Decision) -> None:
        """Answer those who would gain least, where so many wait for a better answer that most wait in vain: they would
        fill the queue, and others be refused any."""
        too_many = self.waiting.rows - self._most_rows
        if too_many <= 0 or not self._may_let_go:
            return
        least_first = merge(*(_without_wish(queue) for queue in self.waiting.queues.values()))
        least = [row for _, _, row in islice(least_first, too_many)]
        self._may_let_go = len(least) == too_many
        for row in least:
            take_out(row)
            self.answer(row, decision)

    def best(self, now_s: float, limit_s: float) -> BestBatch | None:
        """The batch that gains most per second among rows that have the time for a better answer, in runs of at most
        `limit_s`."""
        profile = self._offer.profile
        start_s = now_s + self._offer.careful_reserve_s
        best: BestBatch | None = None
        best_rate = -math.inf
        for segment, queue in self.waiting.queues.items():
            most = min(profile.most_rows(Segment(segment.nodes[:1], segment.embed), limit_s), len(queue.items))
            latencies_s = profile.latencies_s(segment, most)
            places: list[int] = []
            count, best_count, gain, earliest_s = 0, 0, 0.0, math.inf
            for place, (key, row) in enumerate(zip(queue.keys, queue.items, strict=True)):
                if count == most:
                    break
                took_s, deadline_s = latencies_s[count + 1], row.deadline_s
                if deadline_s < start_s + took_s:
                    continue
                earliest_s = min(earliest_s, deadline_s)
                if earliest_s < start_s + took_s:  # one more would make another late
                    break
                places.append(place)
                count += 1
                gain -= key[0]
                if gain / took_s > best_rate:
                    best_rate, best_count = gain / took_s, count
            if best_count:
                best = BestBatch(best_rate, segment, queue, places, best_count, limit_s)
        return best


def _without_wish(queue: Waiting) -> Iterator[tuple[float, int, Row]]:
    """The rows of a queue that nobody asked to go deeper, by what they would gain, least first."""
    for key, row in zip(reversed(queue.keys), reversed(queue.items), strict=True):
        if row.wish.exit_at is None:
            yield -key[0], -row.order, row
