"""Rows without any answer: what they need of the device, the next batch of them, and those for which it is too late."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice

from service.policy.agenda import Agenda, Due
from service.policy.state import Decision, Offer, Row, segment_between
from service.policy.waiting import Group, Reminders, Waiting, take_out
from service.profile import Segment

_CHEAP = 1.25  # how much more of the device's time a row of a cheap batch takes than one of the largest
_NOTHING = Agenda(())


class FirstAnswers:
    """Rows that wait for their first answer, by urgency; beside these the ones that are too `late` for it, which wait
    behind all others. (A row with an answer may be here as well: it waited long enough.)"""

    def __init__(self, offer: Offer) -> None:
        self._offer = offer
        self.waiting = Group()
        self.late = Waiting()
        self._due = Reminders()  # those that have a deadline, by that
        self._slowest = max(
            (Segment(path, embed=True) for path in offer.accuracies), key=lambda path: offer.profile.typical_s(path, 1)
        )

    def add(self, row: Row) -> None:
        """A row waits for what leads to its target."""
        self.waiting.add(row.urgency, row)
        if row.wish.deadline_s is not None:
            self._due.add((row.deadline_s, row.order), row)

    def idle(self) -> None:
        """Nobody waits."""
        self._due.clear()

    def ahead_s(self, row: Row, rows: int) -> float:
        """How long all takes that goes before so many rows like `row`, and these."""
        latency_s, own, work_s = self._offer.profile.latency_s, row.rest, 0.0
        for segment, queue in self.waiting.queues.items():
            count = queue.below(row.urgency) + (rows if segment == own else 0)
            work_s += latency_s(segment, count) if count else 0.0
        if own not in self.waiting.queues:
            work_s += latency_s(own, rows)
        return work_s

    def batches(self) -> dict[Segment, list[Due]]:
        """The full batches that all make, queue by queue."""
        latency_s, most = self._offer.profile.latency_s, self._offer.profile.max_batch
        batches: dict[Segment, list[Due]] = {}
        for segment, queue in self.waiting.queues.items():
            if 0 < (rows := len(queue.keys)) <= most:  # mostly
                batches[segment] = [(queue.keys[0][0], latency_s(segment, rows))]
            elif rows:
                batches[segment] = self._batches_of(segment, queue, 0)
        return batches

    def spare_s(self, now_s: float, batches: Iterable[list[Due]]) -> float:
        """How long a run may take that leaves these batches in time, earliest deadline first."""
        return _NOTHING.spare_s(now_s + self._offer.careful_reserve_s, sorted(chain.from_iterable(batches)))

    def cheap_rows(self) -> int:
        """From how many rows on their batch is cheap."""
        profile, shallowest = self._offer.profile, Segment(self._offer.climb[0], embed=True)
        most_s = _CHEAP * profile.latency_s(shallowest, profile.max_batch) / profile.max_batch
        cheap = (size for size in profile.parts.batches if profile.latency_s(shallowest, size) <= size * most_s)
        return next(cheap, profile.max_batch)

    def rate(self) -> float:
        """What running the next ones now is worth per second. The answers themselves are safe, so it is what they open the
        way to: the expected gain of the step after them."""
        offer = self._offer
        if len(offer.climb) < 2:
            return 0.0
        one, two = offer.climb[:2]
        rows = min(self.waiting.rows, offer.profile.max_batch)
        step = segment_between(one, two)
        took_s = offer.profile.latency_s(Segment(one, embed=True), rows) + offer.profile.latency_s(step, rows)
        return rows * (offer.accuracies[two] - offer.accuracies[one]) / took_s

    def set_aside(self, now_s: float, decision: Decision) -> None:
        """Rows that are too late make room for those that are not."""
        while self.late.items and self.late.items[0].deadline_s <= now_s:
            decision.expired.extend(self.late.take_places([0]))
        likely_s, start_s = self._offer.profile.likely_s, now_s + self._offer.likely_reserve_s
        for row in self._due.take_before((start_s + likely_s(self._slowest, 1),)):
            if row.deadline_s >= start_s + likely_s(row.rest, 1):
                self._due.add((row.deadline_s, row.order), row)
                continue
            take_out(row)
            if not row.at and row.deadline_s <= now_s:
                decision.expired.append(row)
            elif row.wish.strict:
                decision.refused.append(row)
            elif row.at:  # it has begun, so it is not given up; from now on as urgent as one without a budget
                self.waiting.add((row.patient_until_s, 0, row.order), row)
            else:
                self.late.add(row.urgency, row)

    def take(self, now_s: float, batches: dict[Segment, list[Due]]) -> tuple[list[Row], Segment, float]:
        """The most urgent queue's next batch, and how long it may take so that all others of `batches` are in time."""
        segment = min(batches, key=lambda each: self.waiting.queues[each].keys[0])
        queue = self.waiting.queues[segment]
        others = Agenda(chain.from_iterable(batch for other, batch in batches.items() if other is not segment))
        ready_s = now_s + self._offer.careful_reserve_s
        rows = queue.take_places(self._places(segment, queue, now_s, ready_s, others))
        return rows, segment, others.spare_s(ready_s, self._batches_of(segment, queue, 0))

    def take_late(self, limit_s: float) -> tuple[list[Row], Segment] | None:
        """Some of those that are too late, in a run of at most `limit_s` or of one."""
        if not self.late.items:
            return None
        target, segment = self.late.items[0].target, self.late.items[0].rest  # none has begun
        most = self._offer.profile.most_rows(segment, limit_s) or 1
        places = islice((place for place, row in enumerate(self.late.items) if row.target == target), most)
        return self.late.take_places(places), segment

    def _batches_of(self, segment: Segment, queue: Waiting, start: int) -> list[Due]:
        """The full batches of one queue from this place on. What the first row of a batch needs, all get."""
        profile = self._offer.profile
        keys = queue.keys
        whole, rest = divmod(len(keys) - start, profile.max_batch)
        batches: list[Due] = []
        if whole > 0:
            took_s = profile.latency_s(segment, profile.max_batch)
            batches = [(key[0], took_s) for key in keys[start :: profile.max_batch][:whole]]
        if rest > 0:
            batches.append((keys[-rest][0], profile.latency_s(segment, rest)))
        return batches

    def _places(self, segment: Segment, queue: Waiting, now_s: float, ready_s: float, others: Agenda) -> list[int]:
        """Which rows of the queue the next batch has, if `others` run from `ready_s` on."""
        latency_s, likely_s = self._offer.profile.latency_s, self._offer.profile.likely_s
        start_s = now_s + self._offer.likely_reserve_s
        # Those that are due and still here have no deadline to keep (`set_aside`). They waited long enough.
        due = queue.below((start_s + likely_s(segment, 1),))
        best, places = 0.0, [0]
        most = min(len(queue), self._offer.profile.max_batch)
        for rows in (most, *(size for size in reversed(self._offer.profile.parts.batches) if size < most)):
            took_s = latency_s(segment, rows)
            patient = min(due, rows)
            first = max(patient, queue.below((start_s + likely_s(segment, rows),)))
            if first == patient or patient == rows:
                left = self._batches_of(segment, queue, rows)
                if others.spare_s(ready_s, left) >= took_s:
                    return list(range(rows))
            in_time = min(rows - patient, len(queue) - first)
            count = patient + in_time
            if count > 0 and count / (took_s := latency_s(segment, count)) > best:
                best, places = count / took_s, [*range(patient), *range(first, first + in_time)]
        return places
