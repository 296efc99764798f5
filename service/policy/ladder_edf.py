"""Our policy: rung by rung, earliest deadline first.

A row without any answer wants its first one, the shallowest path; a row with an answer may go deeper, along the
climb. Both move in runs that can end at any block, so that rows on different paths that go to the same block next
share a batch, and newcomers join in between. Whenever the device is free:

1.  First answers are safe. Earliest deadline first, they run in the largest batch that lets every row that waits for one
    have it in time. Where that is not possible, the batch runs that gives most first answers in time per second; rows that
    are too late for theirs wait behind all others. Deeper work goes before them only while more of them would make their
    batch cheaper, and only for a share of the time that they can spare; or if they can spare more than the tightest budget
    seen lately, which is what whoever comes next may need. It runs no longer than a share of that budget, for those who
    come meanwhile.
2.  Within that, the batch with the highest expected gain per second runs: of deeper work what it puts right, given each
    row's confidence (`Offer.gain`); of first answers what the step after them puts right.
3.  Rows that are not worth the device's time are answered at once (`service.policy.price`), and so are those that could
    not go deeper in time after the run that is about to begin.
4.  If nothing else waits, rows without a wish go to the best path directly; and to a deeper one than the shallowest if that
    takes less time than one run for a first answer and another for those that are unsure then.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import NamedTuple

from service.policy.joining import join
from service.policy.price import Price
from service.policy.queues import Key, SortedQueue
from service.policy.state import Batch, Decision, Offer, Row, Step, segment_between
from service.policy.straight import straight
from service.policy.wish import StoppedBy, Wish
from service.profile import Segment

_SHARE_OF_BUDGET = 0.2
_MOST_BATCHES = 8  # of rows that wait for a better answer
_SPARE_SHARE = 0.5  # of the time that first answers can spare, for deeper work
_CHEAP = 1.25  # how much more of the device's time a row of a cheap batch takes than one of the largest
_FORGETTING = 1.02  # the factor by which the tightest budget is relaxed with every arrival

Queues = dict[Segment, SortedQueue[Row]]

_Due = tuple[float, float]
"""When a batch is due, and how long it takes."""


class _Deeper(NamedTuple):
    """Rows at these places of a queue could go deeper: their expected gain per second, and how long a run may be."""

    rate: float
    segment: Segment
    queue: SortedQueue[Row]
    places: list[int]
    limit_s: float


class LadderEdf:
    """See the module; the methods are those of `Policy`."""

    def __init__(self, offer: Offer) -> None:
        self._offer = offer
        self._price = Price(offer)
        self._first: Queues = {}  # rows without an answer, by what they have to run for it; by urgency
        self._deeper: Queues = {}  # rows with an answer, by what they would run next; highest gain first
        self._late: SortedQueue[Row] = SortedQueue()  # too late for their first answer; by urgency
        self._until: list[tuple[float, int, int, Row]] = []  # heap of rows in `_deeper`: from when too late, order, turn
        self._done: list[tuple[Row, StoppedBy]] = []
        self._tightest_s = math.inf
        self._arrived_s = -math.inf
        self._waiting = 0
        largest = offer.profile.max_batch
        self._sizes = (largest, *(2**k for k in reversed(range(largest.bit_length())) if 2**k < largest))
        blocks = [Segment((node,), embed=True) for node in offer.profile.parts.nodes]
        self._slowest = max(blocks, key=lambda block: offer.profile.typical_s(block, 1))

    def waiting(self) -> int:
        """See `Policy`."""
        return self._waiting

    def arrive(self, row: Row, now_s: float) -> None:
        """See `Policy`."""
        self._price.busy(now_s)
        row.target = row.wish.path or self._offer.climb[0]
        budget_s = row.deadline_s - now_s
        if budget_s > self._offer.profile.latency_s(row.rest, 1):  # others nobody could meet
            forgetting = _FORGETTING if now_s > self._arrived_s else 1.0  # once for all rows of a request
            self._tightest_s = min(budget_s, self._tightest_s * forgetting)
            self._arrived_s = now_s
        self._place(row, self._first, row.urgency)

    def leave(self, row: Row) -> None:
        """See `Policy`."""
        row.gone = True
        if row.place is not None:
            self._take_out(row)

    def finished(self, batch: Batch, confidences: Sequence[float], now_s: float) -> None:
        """See `Policy`."""
        segment = batch.segment
        options = {}
        for row, confidence in zip(batch.rows, confidences, strict=True):
            if row.gone:
                continue
            row.at = segment.nodes if segment.embed else row.at + segment.nodes
            if row.at != row.target:
                self._wait(row, now_s)
                continue
            row.answered, row.confidence = row.target, confidence
            stopped_by = self._stops(row)
            if stopped_by is None:
                if row.wish.exit_at is not None:  # it has a wish, whatever that costs
                    following = self._offer.after(row.answered)
                else:
                    if row.answered not in options:
                        options[row.answered] = self._price.options(row.answered, self._quantum_s())
                    left_s = row.deadline_s - now_s - self._offer.careful_reserve_s
                    _, following = self._price.best(options[row.answered], 1 - confidence, left_s)
                if following is not None:
                    row.target = following
                    self._wait(row, now_s)
                    continue
                worth_it = self._price.best(options[row.answered], 1 - confidence)[1] is not None
                stopped_by = "budget" if worth_it else "load"
            self._done.append((row, stopped_by))

    def wake_s(self) -> float:
        """See `Policy`."""
        while self._until and _outdated(self._until[0]):
            heapq.heappop(self._until)
        return self._until[0][0] if self._until else math.inf

    def spare_s(self, now_s: float) -> float:
        """See `Policy`."""
        return self._spare_s(now_s, chain.from_iterable(self._batches().values()))

    def decide(self, now_s: float, spare_s: float = math.inf) -> Decision:
        """See `Policy`."""
        decision = self.settle(now_s, now_s)
        rows, segment = self._choose(now_s, spare_s) if self._waiting else ([], None)
        if segment is None:
            self._price.idle(now_s)
            return decision
        for row in rows:
            self._moves(row)
        decision.batch = Batch.of(rows, segment, self._offer)
        # Who could not go deeper after this run need not wait for its end.
        self._give_up(now_s + decision.batch.expected_s, now_s, decision)
        return decision

    def settle(self, now_s: float, until_s: float) -> Decision:
        """See `Policy`."""
        decision = Decision(done=[(row, stopped_by) for row, stopped_by in self._done if not row.gone])
        self._done = []
        self._first, self._deeper = _not_empty(self._first), _not_empty(self._deeper)
        if not self._waiting:
            return decision
        self._give_up(until_s, now_s, decision)
        self._set_aside(now_s, decision)
        self._let_go(decision)
        return decision

    def foresee(self, wish: Wish, rows: int, now_s: float) -> tuple[Step, ...]:
        """See `Policy`."""
        offer, profile = self._offer, self._offer.profile
        start_s = now_s + offer.reserve_s
        row = Row(wish, now_s, 2**62)
        path = wish.path or offer.climb[0]
        segment = Segment(path, embed=True)
        free = wish.path is None and wish.exit_at is None
        if free and not self._waiting:
            took_s = profile.latency_s(Segment(offer.reference, embed=True), rows)
            if took_s <= min(row.deadline_s - start_s, self._quantum_s()):
                return (Step(offer.reference, start_s + took_s),)
        work_s = 0.0
        for other, queue in self._first.items():
            shared = rows if other == segment else 0
            ahead = queue.below(row.urgency)
            work_s += profile.latency_s(other, ahead + shared) if ahead + shared else 0.0
        if segment not in self._first:
            work_s += profile.latency_s(segment, rows)
        steps = [Step(path, start_s + work_s)]
        while wish.path is None:
            at = steps[-1].path
            wrong = 1 - offer.accuracies[at]
            target = self._price.best(self._price.options(at, self._quantum_s()), wrong)[1] if free else offer.after(at)
            if target is None:
                break
            by_s = steps[-1].by_s + profile.latency_s(segment_between(at, target), rows)
            if by_s > row.deadline_s:
                break
            steps.append(Step(target, by_s))
        return tuple(steps)

    def _choose(self, now_s: float, spare_s: float) -> tuple[list[Row], Segment | None]:
        batches, deeper = self._batches(), None
        if self._deeper:
            deeper = self._best_deeper(now_s, min(spare_s, self._spare_for_deeper_s(now_s, batches)))
        if batches and (deeper is None or deeper.rate <= self._first_rate()):
            return self._first_answers(now_s, spare_s, batches)
        if deeper is not None:
            rows = deeper.queue.take_places(deeper.places)
            return self._join(rows, deeper.segment, now_s, deeper.limit_s, deeper.limit_s)
        return self._late_answers(now_s, spare_s)

    def _spare_for_deeper_s(self, now_s: float, batches: dict[Segment, list[_Due]]) -> float:
        """How long deeper work may keep these batches of first answers waiting."""
        if not batches:
            return math.inf
        first_spare_s = self._spare_s(now_s, chain.from_iterable(batches.values()))
        if sum(map(len, self._first.values())) < self._cheap_rows():
            return _SPARE_SHARE * first_spare_s
        return max(0.0, first_spare_s - self._tightest_s)

    def _cheap_rows(self) -> int:
        """From how many rows on first answers are cheap."""
        profile, shallowest = self._offer.profile, Segment(self._offer.climb[0], embed=True)
        most_s = _CHEAP * profile.latency_s(shallowest, profile.max_batch) / profile.max_batch
        cheap = (size for size in reversed(self._sizes) if profile.latency_s(shallowest, size) <= size * most_s)
        return next(cheap, profile.max_batch)

    def _first_rate(self) -> float:
        """What running the next first answers now is worth per second. The answers themselves are safe, so it is what
        they open the way to: the expected gain of the step after them."""
        offer = self._offer
        if len(offer.climb) < 2:
            return 0.0
        one, two = offer.climb[:2]
        rows = min(sum(map(len, self._first.values())), offer.profile.max_batch)
        step = segment_between(one, two)
        took_s = offer.profile.latency_s(Segment(one, embed=True), rows) + offer.profile.latency_s(step, rows)
        return rows * (offer.accuracies[two] - offer.accuracies[one]) / took_s

    def _stops(self, row: Row) -> StoppedBy | None:
        """Why the answer that a row just got is final, whatever the time and the load; none if it may go deeper."""
        wish = row.wish
        if wish.path is not None or (wish.exit_at is not None and row.confidence >= wish.exit_at):
            return wish.asked_as
        return "complete" if row.answered == self._offer.reference else None

    def _wait(self, row: Row, now_s: float) -> None:
        """Let a row wait for what it wants next, or answer it if there is no time for that."""
        if row.answered is None:
            self._place(row, self._first, row.urgency)
            return
        patient = row.wish.deadline_s is None
        if patient and row.wish.exit_at is not None and now_s >= row.patient_until_s:
            self._place(row, self._first, row.urgency)  # it has a wish and waited long enough: as urgent as a first answer
            return
        segment = row.rest
        gain = self._offer.gain(row.answered, row.target, row.confidence)
        until_s = row.patient_until_s
        if not patient:
            until_s = row.deadline_s - self._offer.careful_reserve_s - self._offer.in_pieces_s(segment, self._quantum_s())
            if until_s < now_s:
                self._done.append((row, "budget"))
                return
        self._place(row, self._deeper, (-gain, row.order))
        heapq.heappush(self._until, (math.nextafter(until_s, math.inf), row.order, row.turn, row))
        if len(self._until) > 2 * self._waiting + 64:  # else rows of far deadlines would be kept long after they left
            self._until = [entry for entry in self._until if not _outdated(entry)]
            heapq.heapify(self._until)

    def _place(self, row: Row, queues: Queues, key: Key) -> None:
        queue = queues.setdefault(row.rest, SortedQueue())
        queue.add(key, row)
        row.place = queue, key
        self._waiting += 1

    def _take_out(self, row: Row) -> None:
        """Out of where it waits."""
        assert row.place is not None
        queue, key = row.place
        queue.remove(key)
        self._moves(row)

    def _moves(self, row: Row) -> None:
        """It is no more where it waited."""
        row.place = None
        row.turn += 1
        self._waiting -= 1

    def _give_up(self, until_s: float, now_s: float, decision: Decision) -> None:
        """Answer rows whose next step would be too late at `until_s`; a patient row with a wish gets urgent instead."""
        while self.wake_s() <= until_s and self._until:
            row = heapq.heappop(self._until)[-1]
            self._take_out(row)
            if row.wish.exit_at is not None and row.wish.deadline_s is None:
                self._wait(row, max(now_s, row.patient_until_s))
            else:
                self._answer(row, decision)

    def _answer(self, row: Row, decision: Decision) -> None:
        """Its latest answer is final, for lack of time."""
        assert row.answered is not None
        if row.wish.exit_at is None:
            self._price.given_up(row.answered, row.target, row.confidence)
        decision.done.append((row, "load"))

    def _let_go(self, decision: Decision) -> None:
        """Answer those who would gain least, where so many wait for a better answer that most wait in vain: they would
        fill the queue, and others be refused any."""
        excess = sum(map(len, self._deeper.values())) - _MOST_BATCHES * self._offer.profile.max_batch
        if excess <= 0:
            return
        waiting = [(queue.key(place), row) for queue in self._deeper.values() for place, row in enumerate(queue)]
        free = [(key, row) for key, row in waiting if row.wish.exit_at is None]
        for _, row in heapq.nlargest(excess, free, key=lambda each: each[0]):
            self._take_out(row)
            self._answer(row, decision)

    def _set_aside(self, now_s: float, decision: Decision) -> None:
        """Rows that are too late for a first answer make room for those that are not."""
        while self._late and self._late[0].deadline_s <= now_s:
            (row,) = self._late.take_places([0])
            self._moves(row)
            decision.expired.append(row)
        start_s = now_s + self._offer.reserve_s
        for segment, queue in self._first.items():
            for row in queue.before((start_s + self._offer.profile.latency_s(segment, 1),)):
                assert row.place is not None
                _, key = row.place
                if key[0] != row.deadline_s:  # it has none, or was too late before
                    continue
                self._take_out(row)
                if not row.at and row.deadline_s <= now_s:
                    decision.expired.append(row)
                elif row.wish.strict:
                    decision.refused.append(row)
                elif row.at:  # it has begun, so it is not given up; from now on as urgent as one without a budget
                    self._place(row, self._first, (row.patient_until_s, 0, row.order))
                else:
                    self._late.add(row.urgency, row)
                    row.place = self._late, row.urgency
                    self._waiting += 1

    def _spare_s(self, now_s: float, batches: Iterable[_Due]) -> float:
        """How long a run may take that leaves all first answers in time: these batches, earliest deadline first."""
        spare_s, ready_s = math.inf, now_s + self._offer.careful_reserve_s
        for due_s, took_s in sorted(batches):
            ready_s += took_s
            spare_s = min(spare_s, due_s - ready_s)
        return spare_s

    def _batches(self) -> dict[Segment, list[_Due]]:
        """The full batches that all first answers make, queue by queue."""
        return {segment: self._batches_of(segment, queue, 0) for segment, queue in self._first.items() if queue}

    def _batches_of(self, segment: Segment, queue: SortedQueue[Row], start: int) -> list[_Due]:
        """The same for one queue from this place on. What the first row of a batch needs, all get."""
        profile = self._offer.profile
        whole, rest = divmod(len(queue) - start, profile.max_batch)
        batches: list[_Due] = []
        if whole > 0:
            took_s = profile.latency_s(segment, profile.max_batch)
            batches = [(due_s, took_s) for due_s, *_ in queue.keys(start, profile.max_batch)[:whole]]
        if rest > 0:
            batches.append((queue.key(len(queue) - rest)[0], profile.latency_s(segment, rest)))
        return batches

    def _quantum_s(self) -> float:
        """The longest that a run may take because of rows that have not arrived yet; one row can always run a block."""
        share_s = _SHARE_OF_BUDGET * (self._tightest_s - self._offer.careful_reserve_s)
        return max(share_s, self._offer.profile.latency_s(self._slowest, 1))

    def _first_answers(self, now_s: float, spare_s: float, batches: dict[Segment, list[_Due]]) -> tuple[list[Row], Segment]:
        """The most urgent queue's next batch."""
        segment = min(batches, key=lambda each: self._first[each].key(0))
        queue = self._first[segment]
        others = [batch for other, of_other in batches.items() if other != segment for batch in of_other]
        places = self._first_places(segment, queue, now_s, others)
        alone = self._waiting == len(places)
        rows = queue.take_places(places)
        left_s = self._spare_s(now_s, (*others, *self._batches_of(segment, queue, 0)))
        limit_s = min(spare_s, self._quantum_s())
        path = straight(self._offer, self._price.per_second, rows, now_s, min(limit_s, left_s), alone=alone)
        if path is not None:
            for row in rows:
                row.target = path
            return rows, Segment(path, embed=True)
        return self._join(rows, segment, now_s, limit_s, left_s)

    def _first_places(self, segment: Segment, queue: SortedQueue[Row], now_s: float, others: Sequence[_Due]) -> list[int]:
        """Which rows of the queue the batch has, beside those batches."""
        latency_s, start_s = self._offer.profile.latency_s, now_s + self._offer.reserve_s
        # Those that are due and still here have no deadline to keep (`_set_aside`). They waited long enough.
        due = queue.below((start_s + latency_s(segment, 1),))
        best, places = 0.0, [0]
        for size in self._sizes:
            rows = min(size, len(queue))
            took_s = latency_s(segment, rows)
            patient = min(due, rows)
            first = max(patient, queue.below((start_s + took_s,)))
            if first == patient or patient == rows:
                left = self._batches_of(segment, queue, rows)
                if self._spare_s(now_s, (*others, *left)) >= took_s:
                    return list(range(rows))
            in_time = min(rows - patient, len(queue) - first)
            count = patient + in_time
            if count > 0 and count / (took_s := latency_s(segment, count)) > best:
                best, places = count / took_s, [*range(patient), *range(first, first + in_time)]
        return places

    def _best_deeper(self, now_s: float, spare_s: float) -> _Deeper | None:
        """The batch that gains most per second among rows that have an answer and the time for a better one."""
        profile = self._offer.profile
        limit_s = min(spare_s, self._quantum_s())
        best: _Deeper | None = None
        for segment, queue in self._deeper.items():
            if not queue:
                continue
            block = Segment(segment.nodes[:1], segment.embed)
            most = next((size for size in self._sizes if profile.latency_s(block, size) <= limit_s), 0)
            places: list[int] = []
            gain, earliest_s, start_s = 0.0, math.inf, now_s + self._offer.careful_reserve_s
            took_s = profile.latency_s(segment, 1)
            for place, row in enumerate(queue):
                if len(places) >= most:
                    break
                deadline_s = row.deadline_s
                if deadline_s < start_s + took_s:
                    continue
                earliest_s = min(earliest_s, deadline_s)
                if earliest_s < start_s + took_s:  # one more would make another late
                    break
                places.append(place)
                gain -= queue.key(place)[0]
                if best is None or gain / took_s > best.rate:
                    best = _Deeper(gain / took_s, segment, queue, places.copy(), limit_s)
                took_s = profile.latency_s(segment, len(places) + 1)
        return best

    def _join(
        self, rows: list[Row], segment: Segment, now_s: float, limit_s: float, spare_s: float
    ) -> tuple[list[Row], Segment]:
        """See `join`: with all rows that wait in order."""
        queues = (*self._first.items(), *self._deeper.items())
        return join(rows, segment, queues, self._offer.profile, now_s + self._offer.reserve_s, limit_s, spare_s)

    def _late_answers(self, now_s: float, spare_s: float) -> tuple[list[Row], Segment | None]:
        """Rows that nobody else keeps from their late answer."""
        if not self._late:
            return [], None
        target, segment = self._late[0].target, self._late[0].rest  # none has begun
        limit_s = min(spare_s, self._quantum_s())
        most = next((size for size in self._sizes if self._offer.profile.latency_s(segment, size) <= limit_s), 1)
        places = islice((place for place, row in enumerate(self._late) if row.target == target), most)
        return self._join(self._late.take_places(places), segment, now_s, limit_s, spare_s)


def _outdated(entry: tuple[float, int, int, Row]) -> bool:
    _, _, turn, row = entry
    return row.place is None or row.turn != turn


def _not_empty(queues: Queues) -> Queues:
    return {segment: queue for segment, queue in queues.items() if queue}
