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
4.  While many requests wait to be read, nothing goes deeper: they are to have their first answers too, and reading takes
    the longer the busier the device is.
5.  If nothing else waits, rows without a wish go to the best path directly; and to a deeper one than the shallowest if that
    takes less time than one run for a first answer and another for those that are unsure then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from family.tree import Path
from service.policy.agenda import Due
from service.policy.deeper import DeeperWork
from service.policy.first import FirstAnswers
from service.policy.joining import join
from service.policy.price import Option, Price
from service.policy.state import Batch, Decision, Offer, Row, Step, segment_between
from service.policy.straight import straight
from service.policy.waiting import take_out
from service.policy.wish import StoppedBy, Wish
from service.profile import Segment

_SHARE_OF_BUDGET = 0.5  # for one run, because of rows that may come meanwhile
_SPARE_SHARE = 0.5  # of the time that first answers can spare, for deeper work
_FORGETTING = 1.02  # the factor by which the tightest budget is relaxed with every arrival

_WaysOn = dict[Path, tuple[list[Option], float]]  # from an answer, and from which doubt on they are worth it


class _Pieces(dict[Segment, float]):
    """Seconds that a row takes through segments in runs of at most `quantum_s`: each is worked out once for all rows."""

    def __init__(self, offer: Offer, quantum_s: float) -> None:
        self._offer, self._quantum_s = offer, quantum_s

    def __missing__(self, segment: Segment) -> float:
        took_s = self[segment] = self._offer.in_pieces_s(segment, self._quantum_s)
        return took_s


class LadderEdf:
    """See the module; the methods are those of `Policy`."""

    def __init__(self, offer: Offer) -> None:
        self._offer = offer
        self._price = Price(offer)
        self._first = FirstAnswers(offer)
        self._deeper = DeeperWork(offer, self._price)
        self._done: list[tuple[Row, StoppedBy]] = []
        self._tightest_s = math.inf
        self._arrived_s = -math.inf
        blocks = [Segment((node,), embed=True) for node in offer.profile.parts.nodes]
        self._slowest = max(blocks, key=lambda block: offer.profile.typical_s(block, 1))

    def waiting(self) -> int:
        """See `Policy`."""
        return self._first.waiting.rows + self._deeper.waiting.rows + len(self._first.late)

    def arrive(self, row: Row, now_s: float) -> None:
        """See `Policy`."""
        self._price.busy(now_s)
        row.target = row.wish.path or self._offer.climb[0]
        budget_s = row.deadline_s - now_s
        if budget_s > self._offer.profile.latency_s(row.rest, 1):  # others nobody could meet
            forgetting = _FORGETTING if now_s > self._arrived_s else 1.0  # once for all rows of a request
            self._tightest_s = min(budget_s, self._tightest_s * forgetting)
            self._arrived_s = now_s
        self._first.add(row)

    def leave(self, row: Row) -> None:
        """See `Policy`."""
        row.gone = True
        if row.place is not None:
            take_out(row)

    def finished(self, batch: Batch, confidences: Sequence[float], now_s: float) -> None:
        """See `Policy`."""
        segment, quantum_s, reserve_s = batch.segment, self._quantum_s(), self._offer.careful_reserve_s
        ways_on, pieces_s = _WaysOn(), _Pieces(self._offer, quantum_s)
        for row, confidence in zip(batch.rows, confidences, strict=True):
            if row.gone:
                continue
            row.at = segment.nodes if segment.embed else row.at + segment.nodes
            if row.at != row.target:
                self._wait(row, now_s, pieces_s, reserve_s)
                continue
            row.answered, row.confidence = row.target, confidence
            stopped_by = self._stops(row)
            if stopped_by is None:
                stopped_by, following = self._next(row, ways_on, quantum_s, now_s + reserve_s)
                if following is not None:
                    row.target = following
                    self._wait(row, now_s, pieces_s, reserve_s)
                    continue
            self._done.append((row, stopped_by))

    def wake_s(self) -> float:
        """See `Policy`."""
        return self._deeper.wake_s()

    def spare_s(self, now_s: float) -> float:
        """See `Policy`."""
        return self._first.spare_s(now_s, self._first.batches().values())

    def decide(self, now_s: float, spare_s: float = math.inf, *, crowded: bool = False) -> Decision:
        """See `Policy`."""
        decision = self.settle(now_s, now_s)
        chosen = self._choose(now_s, spare_s, crowded) if self.waiting() else None
        if chosen is None:
            if not self.waiting():
                self._price.idle(now_s)
                self._first.idle()
                self._deeper.idle()
            return decision
        decision.batch = Batch.of(*chosen, self._offer)
        # Who could not go deeper after this run need not wait for its end.
        self._give_up(now_s + decision.batch.expected_s, decision)
        return decision

    def settle(self, now_s: float, until_s: float) -> Decision:
        """See `Policy`."""
        decision = Decision(done=[(row, stopped_by) for row, stopped_by in self._done if not row.gone])
        self._done = []
        self._first.waiting.drop_empty()
        self._deeper.waiting.drop_empty()
        self._give_up(until_s, decision)
        self._first.set_aside(now_s, decision)
        self._deeper.let_go(decision)
        return decision

    def foresee(self, wish: Wish, rows: int, now_s: float) -> tuple[Step, ...]:
        """See `Policy`."""
        offer, profile = self._offer, self._offer.profile
        start_s = now_s + offer.reserve_s
        path = wish.path or offer.climb[0]
        row = Row(wish, now_s, 2**62, target=path)
        free = wish.path is None and wish.exit_at is None
        if free and not self.waiting():
            took_s = profile.latency_s(Segment(offer.reference, embed=True), rows)
            if took_s <= min(row.deadline_s - start_s, self._quantum_s()):
                return (Step(offer.reference, start_s + took_s),)
        steps = [Step(path, start_s + self._first.ahead_s(row, rows))]
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

    def _choose(self, now_s: float, spare_s: float, crowded: bool) -> tuple[list[Row], Segment] | None:
        """The next batch, and how far it runs."""
        batches, deeper = self._first.batches(), None
        limit_s = min(spare_s, self._quantum_s())
        if self._deeper.waiting.rows and not crowded:
            deeper = self._deeper.best(now_s, min(limit_s, self._spare_for_deeper_s(now_s, batches)))
        if batches and (deeper is None or deeper.rate <= self._first.rate()):
            return self._first_answers(now_s, limit_s, batches, crowded)
        if deeper is not None:
            return self._join(deeper.take(), deeper.segment, now_s, deeper.limit_s, deeper.limit_s, crowded)
        if late := self._first.take_late(limit_s):
            return self._join(*late, now_s, limit_s, spare_s, crowded)
        return None

    def _first_answers(
        self, now_s: float, limit_s: float, batches: dict[Segment, list[Due]], crowded: bool
    ) -> tuple[list[Row], Segment]:
        """The next batch of first answers, straight to a deeper path if that is as good."""
        rows, segment, left_s = self._first.take(now_s, batches)
        path, short_s = None, min(limit_s, left_s)
        if not crowded:
            path = straight(self._offer, self._price.per_second, rows, now_s, short_s, alone=not self.waiting())
        if path is None:
            return self._join(rows, segment, now_s, limit_s, left_s, crowded)
        for row in rows:
            row.target = path
        return rows, Segment(path, embed=True)

    def _spare_for_deeper_s(self, now_s: float, batches: dict[Segment, list[Due]]) -> float:
        """How long deeper work may keep these batches of first answers waiting."""
        if not batches:
            return math.inf
        first_spare_s = self._first.spare_s(now_s, batches.values())
        if self._first.waiting.rows < self._first.cheap_rows():
            return _SPARE_SHARE * first_spare_s
        return max(0.0, first_spare_s - self._tightest_s)

    def _next(self, row: Row, ways_on: _WaysOn, quantum_s: float, ready_s: float) -> tuple[StoppedBy, Path | None]:
        """Where a row goes from the answer that it just got; if nowhere, why. `ways_on`: those found for other rows."""
        at, wrong = row.target, 1 - row.confidence
        if row.wish.exit_at is not None:  # it has a wish, whatever that costs
            return "budget", self._offer.after(at)
        if at not in ways_on:
            options = self._price.options(at, quantum_s)
            ways_on[at] = options, self._price.least_wrong(options)
        options, least_wrong = ways_on[at]
        if wrong <= least_wrong:  # mostly, in an overload
            return "load", None
        return "budget", self._price.best(options, wrong, row.deadline_s - ready_s)[1]

    def _stops(self, row: Row) -> StoppedBy | None:
        """Why the answer that a row just got is final, whatever the time and the load; none if it may go deeper."""
        wish = row.wish
        if wish.path is not None or (wish.exit_at is not None and row.confidence >= wish.exit_at):
            return wish.asked_as
        return "complete" if row.answered == self._offer.reference else None

    def _wait(self, row: Row, now_s: float, pieces_s: _Pieces, reserve_s: float) -> None:
        """Let a row wait for what it wants next, or answer it if there is no time for that."""
        patient = row.wish.deadline_s is None
        until_s = row.patient_until_s
        if row.answered is None or (patient and row.wish.exit_at is not None and now_s >= until_s):
            self._first.add(row)  # if it has an answer, it has a wish and waited long enough: as urgent as the others
            return
        if not patient:
            until_s = row.deadline_s - reserve_s - pieces_s[row.rest]
            if until_s < now_s:
                self._done.append((row, "budget"))
                return
        self._deeper.add(row, until_s)

    def _give_up(self, until_s: float, decision: Decision) -> None:
        """Answer rows whose next step would be too late at `until_s`; a patient row with a wish gets urgent instead."""
        for row in self._deeper.take_late(until_s):
            if row.wish.exit_at is not None and row.wish.deadline_s is None:
                self._first.add(row)
            else:
                self._deeper.answer(row, decision)

    def _quantum_s(self) -> float:
        """The longest that a run may take because of rows that have not arrived yet; one row can always run a block."""
        share_s = _SHARE_OF_BUDGET * (self._tightest_s - self._offer.careful_reserve_s)
        return max(share_s, self._offer.profile.latency_s(self._slowest, 1))

    def _join(
        self, rows: list[Row], segment: Segment, now_s: float, limit_s: float, spare_s: float, crowded: bool
    ) -> tuple[list[Row], Segment]:
        """See `join`: with all rows that wait in order, in a crowd with none that have an answer."""
        deeper = () if crowded else self._deeper.waiting.queues.items()
        queues = (*self._first.waiting.queues.items(), *deeper)
        return join(rows, segment, queues, self._offer.profile, now_s + self._offer.reserve_s, limit_s, spare_s)
