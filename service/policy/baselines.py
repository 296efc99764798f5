"""The policies that ours is compared with, as published, on whole paths: one queue, earliest deadline first.

They differ in what they choose for rows without a wish: which path, and how many rows. An explicit path is obeyed by all,
and rows with a confidence target climb, a batch from answer to answer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import takewhile

from family.tree import Path
from service.policy.state import Batch, Decision, Offer, Row, Step
from service.policy.waiting import Waiting, take_out
from service.policy.wish import StoppedBy, Wish
from service.profile import Segment


class WholePaths(ABC):
    """What the baselines share; the methods are those of `Policy`.

    `choose(slack_s, waiting)` gives the path and the largest number of rows of the next batch.
    """

    def __init__(self, offer: Offer) -> None:
        self._offer = offer
        self._queue = Waiting()
        self._done: list[tuple[Row, StoppedBy]] = []
        paths = [Segment(path, embed=True) for path in offer.accuracies]
        self._slowest = max(paths, key=lambda path: offer.profile.typical_s(path, 1))

    @abstractmethod
    def choose(self, slack_s: float, waiting: int) -> tuple[Path, int]:
        """The path and at most how many rows, for a head with this slack."""

    def waiting(self) -> int:
        """See `Policy`."""
        return len(self._queue)

    def arrive(self, row: Row, now_s: float) -> None:  # noqa: ARG002
        """See `Policy`."""
        row.target = row.wish.path or self._offer.climb[0]
        self._queue.add(row.urgency, row)

    def leave(self, row: Row) -> None:
        """See `Policy`."""
        row.gone = True
        if row.place is not None:
            take_out(row)

    def _overdue(self, until_s: float) -> list[Row]:
        """The rows at the head of the queue that are due by then."""
        return list(takewhile(lambda row: row.urgency[0] <= until_s, self._queue.items))

    def wake_s(self) -> float:
        """See `Policy`: whatever waits runs as soon as it can."""
        return math.inf

    def spare_s(self, now_s: float) -> float:
        """See `Policy`."""
        if not self._queue:
            return math.inf
        due_s: float = self._queue.keys[0][0]
        return due_s - now_s - self._offer.reserve_s - self._latency_s(self._offer.front[0], 1)

    def decide(
        self,
        now_s: float,
        spare_s: float = math.inf,  # noqa: ARG002 (baselines are selfish)
        *,
        crowded: bool = False,  # noqa: ARG002
    ) -> Decision:
        """See `Policy`."""
        decision = self.settle(now_s, now_s)
        while self._queue and decision.batch is None:
            rows, segment = self._next(now_s)
            took_s = self._offer.profile.latency_s(segment, len(rows))
            rows = [row for row in rows if not self._gives_up(row, now_s + took_s, decision)]
            if rows:
                decision.batch = Batch.of(rows, segment, self._offer)
                self._settle(now_s, now_s + decision.batch.expected_s, decision)
        return decision

    def _next(self, now_s: float) -> tuple[list[Row], Segment]:
        """Take the next batch out of the queue."""
        # Heads that are too late even for the shallowest path let the others go first, as with our own policy: published
        # descriptions leave open what becomes of them, and run first they would make all after them late as well.
        ready_s = now_s + self._offer.reserve_s + self._latency_s(self._offer.front[0], 1)
        ready = (
            place for place, row in enumerate(self._queue.items) if row.answered is not None or row.deadline_s >= ready_s
        )
        start = next(ready, 0)
        head = self._queue.items[start]
        slack_s = head.deadline_s - now_s - self._offer.reserve_s
        most = self._offer.profile.max_batch
        if _is_free(head):
            head.target, most = self.choose(slack_s, len(self._queue))
        segment = head.rest
        places = []
        for place in range(start, len(self._queue)):
            row = self._queue.items[place]
            if row is head or (_is_free(row) and _is_free(head)) or row.rest == segment:
                row.target = head.target
                places.append(place)
                if len(places) == most:
                    break
        return self._queue.take_places(places), segment

    def _gives_up(self, row: Row, ready_s: float, decision: Decision) -> bool:
        """Whether a row that would be ready by then is told the answer that it has, or refused, because that is late."""
        if row.deadline_s >= ready_s + self._offer.reserve_s:
            return False
        if row.answered is not None:
            decision.done.append((row, "budget"))
        elif row.wish.strict:
            decision.refused.append(row)
        else:
            return False
        return True

    def settle(self, now_s: float, until_s: float) -> Decision:
        """See `Policy`."""
        decision = Decision(done=[(row, stopped_by) for row, stopped_by in self._done if not row.gone])
        self._done = []
        self._settle(now_s, until_s, decision)
        return decision

    def _settle(self, now_s: float, until_s: float, decision: Decision) -> None:
        """Give up the rows that could only run from `until_s` on, and for which that is too late."""
        latency_s = self._offer.profile.latency_s
        for row in self._overdue(until_s + self._offer.reserve_s + latency_s(self._slowest, 1)):
            if row.answered is None and row.deadline_s <= now_s:
                take_out(row)
                decision.expired.append(row)
            elif self._gives_up(row, until_s + latency_s(row.rest, 1), decision):
                take_out(row)

    def foresee(self, wish: Wish, rows: int, now_s: float) -> tuple[Step, ...]:
        """See `Policy`: as if all that waits ran before it, on the path that it would get."""
        slack_s = math.inf if wish.deadline_s is None else wish.deadline_s - now_s - self._offer.reserve_s
        path = wish.path
        if path is None:
            path = self._offer.climb[0] if wish.exit_at is not None else self.choose(slack_s, rows)[0]
        took_s = self._latency_s(path, rows + len(self._queue))
        return (Step(path, now_s + self._offer.reserve_s + took_s),)

    def finished(self, batch: Batch, confidences: Sequence[float], now_s: float) -> None:
        """See `Policy`."""
        offer = self._offer
        for row, confidence in zip(batch.rows, confidences, strict=True):
            if row.gone:
                continue
            row.at = row.answered = row.target
            row.confidence = confidence
            following = offer.after(row.target) if row.wish.exit_at is not None else None
            if row.wish.path is not None or (row.wish.exit_at is not None and confidence >= row.wish.exit_at):
                self._done.append((row, row.wish.asked_as))
            elif row.wish.exit_at is None:
                self._done.append((row, "complete" if row.target == offer.reference else "load"))
            elif following is None:
                self._done.append((row, "complete"))
            else:
                row.target = following
                if now_s + offer.profile.latency_s(row.rest, 1) + offer.reserve_s > row.deadline_s:
                    self._done.append((row, "budget"))
                else:
                    self._queue.add(row.urgency, row)

    def _latency_s(self, path: Path, rows: int) -> float:
        return self._offer.profile.latency_s(Segment(path, embed=True), rows)


class Static(WholePaths):
    """One path for all, in batches as large as the queue."""

    def __init__(self, offer: Offer, path: Path) -> None:
        super().__init__(offer)
        self._path = path

    def choose(self, slack_s: float, waiting: int) -> tuple[Path, int]:  # noqa: ARG002
        """Always the same."""
        return self._path, self._offer.profile.max_batch


class Aimd(Static):
    """One path, with Clipper's batching (Crankshaw et al., NSDI 2017): the largest batch grows by one row as long as
    processing a batch takes no longer than the tightest budget in it, and shrinks by a tenth when it does."""

    def __init__(self, offer: Offer, path: Path) -> None:
        super().__init__(offer, path)
        self._most = 1.0
        self._began_s = 0.0

    def decide(self, now_s: float, spare_s: float = math.inf, *, crowded: bool = False) -> Decision:
        """See `Policy`."""
        decision = super().decide(now_s, spare_s, crowded=crowded)
        self._began_s = now_s
        return decision

    def choose(self, slack_s: float, waiting: int) -> tuple[Path, int]:  # noqa: ARG002
        """The path, and as many rows as have gone well so far."""
        return self._path, int(self._most)

    def finished(self, batch: Batch, confidences: Sequence[float], now_s: float) -> None:
        """See `Policy`."""
        tightest_s = min(row.deadline_s - row.arrived_s for row in batch.rows)
        if now_s - self._began_s > tightest_s - self._offer.reserve_s:
            self._most = max(1.0, 0.9 * self._most)
        elif len(batch.rows) >= int(self._most):
            self._most = min(self._most + 1, float(self._offer.profile.max_batch))
        super().finished(batch, confidences, now_s)


class Cheapest(WholePaths):
    """INFaaS (Romero et al., ATC 2021): the cheapest variant that meets the accuracy asked for. Requests ask for none
    here, so: the shallowest path within `tolerance` of the best accuracy, in batches that the head has time for."""

    def __init__(self, offer: Offer, tolerance: float = 0.05) -> None:
        super().__init__(offer)
        wanted = offer.accuracies[offer.reference] - tolerance
        self._path = next(path for path in offer.front if offer.accuracies[path] >= wanted)

    def choose(self, slack_s: float, waiting: int) -> tuple[Path, int]:
        """The cheapest, with the largest batch that fits."""
        return self._path, _largest(self._latency_s, self._path, slack_s, waiting, self._offer)


class MaxAccuracy(WholePaths):
    """The most accurate path that fits the head's slack, then the largest batch of it that does (SuperServe's
    MaxAcc)."""

    def choose(self, slack_s: float, waiting: int) -> tuple[Path, int]:
        """Accuracy first."""
        front = self._offer.front
        path = next((path for path in reversed(front) if self._latency_s(path, 1) <= slack_s), front[0])
        return path, _largest(self._latency_s, path, slack_s, waiting, self._offer)


class MaxBatch(WholePaths):
    """The largest batch that fits the head's slack on the shallowest path, then the most accurate path for that batch
    (SuperServe's MaxBatch)."""

    def choose(self, slack_s: float, waiting: int) -> tuple[Path, int]:
        """Throughput first."""
        front = self._offer.front
        rows = _largest(self._latency_s, front[0], slack_s, waiting, self._offer)
        batch = min(rows, waiting)
        return next((path for path in reversed(front) if self._latency_s(path, batch) <= slack_s), front[0]), rows


class SlackFit(WholePaths):
    """SlackFit (Khare et al., SuperServe, NSDI 2025): the range of latencies is cut into equal buckets; each keeps the
    (path, batch) with the largest batch and then the best accuracy; the head's slack chooses the bucket."""

    def __init__(self, offer: Offer, buckets: int = 20) -> None:
        super().__init__(offer)
        self._buckets = buckets

    def choose(self, slack_s: float, waiting: int) -> tuple[Path, int]:  # noqa: ARG002
        """The best of the fullest bucket below the slack. The latencies are those of the live profile."""
        offer = self._offer
        batches = offer.profile.parts.batches
        cells = [
            (self._latency_s(path, rows), rows, offer.accuracies[path], path) for path in offer.front for rows in batches
        ]
        least_s, most_s = min(cells)[0], max(cells)[0]
        width_s = (most_s - least_s) / self._buckets or 1.0
        fitting = [cell for cell in cells if cell[0] <= slack_s]
        if not fitting:
            return offer.front[0], 1
        top = max(int((cell[0] - least_s) / width_s) for cell in fitting)
        _, rows, _, path = max(
            (cell for cell in fitting if int((cell[0] - least_s) / width_s) == top), key=lambda cell: (cell[1], cell[2])
        )
        return path, rows


class Clockwork(WholePaths):
    """Clockwork (Gujarati et al., OSDI 2020): one model, here the reference path; earliest deadline first; the largest
    batch that the head has time for; a head that cannot be in time is dropped."""

    def choose(self, slack_s: float, waiting: int) -> tuple[Path, int]:
        """The reference path."""
        path = self._offer.reference
        return path, _largest(self._latency_s, path, slack_s, waiting, self._offer)

    def settle(self, now_s: float, until_s: float) -> Decision:
        """See `Policy`: and drop every head that is too late."""
        decision = super().settle(now_s, until_s)
        least_s = now_s + self._offer.reserve_s + self._latency_s(self._offer.reference, 1)
        while self._queue and _is_free(self._queue.items[0]) and self._queue.items[0].deadline_s < least_s:
            row = self._queue.items[0]
            take_out(row)
            decision.refused.append(row)
        return decision


def _is_free(row: Row) -> bool:
    """Whether the policy chooses its path."""
    return row.wish.path is None and row.wish.exit_at is None


def _largest(latency_s: Callable[[Path, int], float], path: Path, slack_s: float, waiting: int, offer: Offer) -> int:
    """The largest profiled batch of `path` within the slack, not larger than needed; at least 1."""
    fitting = [rows for rows in offer.profile.parts.batches if latency_s(path, min(rows, waiting)) <= slack_s]
    return max(fitting, default=1)
