"""Admits requests, has their rows answered, and delivers the answers: what of serving happens on the event loop.

What runs when is decided in `service.policy`, and carried out in `service.dispatch` by the thread of `service.worker`;
routes see the protocol in `service.answers`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

from service.answers import Answer, OnAnswer, RowAnswer
from service.audits import Audits
from service.dispatch import Dispatch, Run, Turn
from service.drift import DriftWatch
from service.errors import (
    DeadlineExpired,
    DeadlineInfeasible,
    InferenceFailed,
    NotReady,
    QueueFull,
    ServiceError,
)
from service.metrics import Metrics
from service.policy import make_policy
from service.policy.state import Step
from service.policy.wish import StoppedBy, Wish
from service.repository import ServedModel
from service.runtime import Rows
from service.tickets import Ticket, TicketRow
from service.tracing import Timed
from service.worker import Worker, WorkerDied

logger = logging.getLogger(__name__)

_MOST_GUESSES = 8
"""Of the smallest budget that can be met: each passes all rows that were due by the one before."""

_ON_LOOP_S = 0.0005
"""A run that takes no longer, for the only request there is, runs on the event loop: the way to the inference thread and
back takes about as long, and so does reading a request."""

_IDLE_S = 0.001
"""When nothing came for so long, nobody needs the device: audits may have it."""


@dataclass(slots=True)
class Engine:
    """Admits requests, batches their rows, and answers them. Made and used on one event loop.

    Args:
        max_batch: rows of one inference.
        max_queue_rows: rows that may wait; a request that does not fit is refused.
        reserve_s: time kept back from every budget to build and send the answer.
        hung_s: the least time after which a run is taken for hung, in real time.
        trace: whether answers carry the spans of their requests.
        clock: monotonic seconds.
    """

    metrics: Metrics
    max_batch: int
    max_queue_rows: int
    reserve_s: float
    hung_s: float = 10.0
    trace: bool = False
    clock: Callable[[], float] = time.monotonic
    _dispatch: Dispatch = field(init=False)
    _audits: Audits = field(init=False)
    _drift: dict[ServedModel, DriftWatch] = field(default_factory=dict)
    _retiring: set[ServedModel] = field(default_factory=set)
    _tickets: set[Ticket] = field(default_factory=set)
    _happened: asyncio.Event = field(default_factory=asyncio.Event)
    _order: itertools.count[int] = field(default_factory=itertools.count)
    _worker: Worker | None = None
    _loop: asyncio.AbstractEventLoop | None = None
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _warm: bool = False
    _well: bool = True
    _error: Exception | None = None
    _stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._dispatch = Dispatch(self.clock, self.hung_s)
        self._audits = Audits(self._order.__next__, self.clock)

    @property
    def ready(self) -> bool:
        """Warm, not stopping, its loop and its thread alive, and no run hung."""
        alive = bool(self._tasks) and not self._tasks[0].done()
        return self._warm and self._well and alive and not self._stopping.is_set() and not self._hangs()

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._stopping.is_set()

    async def start(self, models: Sequence[ServedModel]) -> None:
        """Warm `models` up in the inference thread, then take requests."""
        self._worker, self._loop = Worker("inference", self.metrics.worker_deaths.inc), asyncio.get_running_loop()
        for model in models:
            if self._stopping.is_set():
                return
            await self._worker.run(partial(model.warm_up, self.max_batch, self.clock, self._stopping.is_set))
            if model.profile is not None:
                self.add(model)
        self._tasks = [asyncio.create_task(work(), name="engine") for work in (self._run_forever, self._watch_for_hangs)]
        self._warm = not self._stopping.is_set()

    def add(self, model: ServedModel) -> None:
        """Serve a model that is warm."""
        assert model.profile is not None
        self._dispatch.serve(model, make_policy(model.settings.policy, model.offer(model.profile, self.reserve_s)))
        if model not in self._drift:
            rate = model.settings.audit_rate
            self._drift[model] = DriftWatch(model.labels, model.manifest, rate, self.metrics)
        self.metrics.weights_bytes.labels(*model.labels).set(model.weights_bytes)
        if model.grown_bytes is not None:
            self.metrics.grown_bytes.labels(*model.labels).set(model.grown_bytes)

    def retire(self, model: ServedModel) -> None:
        """Forget a model once the last of its rows has been answered; there are no more audits of it."""
        self._retiring.add(model)
        self._audits.forget(model)
        self._happened.set()

    def drift(self, model: ServedModel) -> DriftWatch | None:
        """The alarms of a model; none while it is not warm."""
        return self._drift.get(model)

    async def stop(self) -> None:
        """Take no more requests, deliver the batch that runs and whatever has an answer, refuse the rest."""
        self._stopping.set()
        self._happened.set()
        if self._tasks:
            running, watching = self._tasks
            watching.cancel()
            await running
        self._dispatch.settle()
        self._hear()
        self._fail_all(NotReady("the server is shutting down"))
        if self._worker is not None:
            await asyncio.to_thread(self._worker.stop)

    def require_room(self, rows: int) -> None:
        """Check that `rows` more may wait now, before work is put into decoding them.

        Raises:
            NotReady: the engine is warming up, shutting down, or its inference thread just died or hangs.
            QueueFull: too many rows wait.
        """
        if not self.ready:
            raise NotReady("the server is warming up, shutting down or stuck: ask again in a second")
        waiting = self._dispatch.waiting()
        if waiting + rows > self.max_queue_rows:
            raise QueueFull(f"{waiting} rows wait already and at most {self.max_queue_rows} may, got {rows} more")

    def foresee(self, model: ServedModel, wish: Wish, rows: int) -> tuple[Step, ...]:
        """The answers that such a request could expect if it came now, on the engine's clock.

        Raises:
            NotReady: the model is not warm.
        """
        self._require_policy(model)
        return self._dispatch.foresee(model, wish, rows)

    async def submit(
        self, model: ServedModel, x: Rows, wish: Wish, arrived_s: float, on_answer: OnAnswer | None = None
    ) -> Answer:
        """Answer the rows of `x (rows, *input_shape) float32`, which arrived at `arrived_s` on the engine's clock.

        Cancelling the call takes its rows out of the queue; those that run go no further than their segment's end.

        Raises:
            NotReady: the engine is warming up or shutting down.
            QueueFull: too many rows wait.
            DeadlineInfeasible: the request is strict and its budget cannot be met.
            DeadlineExpired: the budget ran out before any block had run.
            InferenceFailed: the runtime raised.
        """
        self.require_room(len(x))
        self._require_policy(model)
        now = self.clock()
        if wish.strict and wish.deadline_s is not None:
            by_s = self._feasible_s(model, wish, len(x))
            if by_s > wish.deadline_s:
                self._dispatch.learn_of_refusal(model)
                raise _infeasible(wish.deadline_s, by_s, arrived_s)
        wish, audited = self._drift[model].admit(wish)
        done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        ticket = Ticket(model, arrived_s, done, [None] * len(x), on_answer, [] if self.trace else None)
        chosen = secrets.randbelow(len(x)) if audited else -1  # one row: rows of a request may be much alike
        for index, row in enumerate(x):
            waits = TicketRow(wish, now, next(self._order), model=model, x=row, ticket=ticket, index=index)
            waits.audited = index == chosen
            ticket.rows.append(waits)
        self._tickets.add(ticket)
        self._dispatch.arrive(model, ticket.rows, now)
        self.metrics.requests.labels(*model.labels).inc()
        self.metrics.queue_rows.set(self._dispatch.waiting())
        self._happened.set()
        try:
            return await done
        except asyncio.CancelledError:
            for waits in ticket.rows:
                if waits.audited and ticket.answers[waits.index] is None and done.cancelled():
                    self._audits.cut_short(waits)  # whoever leaves may do so because it takes long
                    self._happened.set()
            self._dispatch.leave(model, ticket.rows)
            self.metrics.queue_rows.set(self._dispatch.waiting())
            raise
        finally:
            self._tickets.discard(ticket)
            ticket.rows.clear()  # which have the ticket: nothing is left for the garbage collector

    def _feasible_s(self, model: ServedModel, wish: Wish, rows: int) -> float:
        """The earliest deadline that could be met, or that of `wish` if it can. A later deadline lets more rows go first,
        so what is expected by one is asked for as the next, until that is met."""
        by_s = -math.inf
        for _ in range(_MOST_GUESSES):
            by_s = self.foresee(model, wish, rows)[0].by_s
            if wish.deadline_s is not None and by_s <= wish.deadline_s:
                return wish.deadline_s
            wish = replace(wish, deadline_s=by_s)
        return by_s

    def _require_policy(self, model: ServedModel) -> None:
        if model not in self._drift:
            if model.profile is None:
                raise NotReady("the model is warming up: ask again in a second")
            self.add(model)  # it was replaced and forgotten while this request was being read
            self.retire(model)

    async def _run_forever(self) -> None:
        """Never ends but by `stop`: a surprise fails the requests that it meets and is logged."""
        while not self._stopping.is_set():
            try:
                await self._run_once()
            except Exception as exc:
                logger.exception("the engine met an error of its own; %d rows are refused", self._dispatch.waiting())
                self._error, self._well = None, True
                if isinstance(exc, WorkerDied):
                    self._fail_all(NotReady("the inference thread was replaced: ask again in a second"))
                else:
                    self._fail_all(InferenceFailed("the server met an error of its own; its log has the cause"))
                self._happened.clear()
                if not self._stopping.is_set():
                    await self._happened.wait()

    async def _run_once(self) -> None:
        self._happened.clear()
        self._begin_overdue_audits()
        run = self._dispatch.decide()
        if run is not None and self._is_short(run):
            run = self._dispatch.run(run, self._stopping.is_set)
        self._hear_or_raise()
        if run is not None:
            await self._carry_out(run)
        wake_s = self._dispatch.wake_s()
        if not self._audits:
            await self._wait(wake_s)
        elif not await self._wait(min(wake_s, self.clock() + _IDLE_S)):
            for _ in range(min(self.max_batch, len(self._audits))):
                self._begin_audit()

    def _is_short(self, run: Run) -> bool:
        """Whether it is quicker done here than told to the inference thread, and nobody else is kept waiting by that."""
        profile = run.model.profile
        assert profile is not None
        return len(self._tickets) == 1 and profile.typical_s(run.batch.segment, len(run.rows)) <= _ON_LOOP_S

    async def _carry_out(self, run: Run) -> None:
        """Let the inference thread run this, and whatever it decides to after it, until there is nothing to run."""
        assert self._worker is not None
        again: Run | None = None
        while True:
            try:
                await self._worker.run(partial(self._run_on, run))
            except WorkerDied:
                self._well = False
                self._hear_or_raise()  # what it had not told
                died_in = self._dispatch.running
                if died_in is None:
                    raise  # while it thought: what it thought of is not to be trusted
                if died_in is again:
                    logger.exception("inference of %d rows of %s failed: it ends its thread", len(run.rows), run.model.name)
                    self._dispatch.give_up(died_in)
                    self._well = True
                    self._hear_or_raise()
                    self._happened.set()
                    return
                run = again = died_in  # perhaps not its fault: once more
                continue
            self._hear_or_raise()
            return

    def _run_on(self, run: Run) -> None:
        """What the inference thread does."""
        assert self._loop is not None
        following: Run | None = run
        while following is not None and self._error is None:
            following = self._dispatch.run(following, self._stopping.is_set)
            self._well = True
            self._loop.call_soon_threadsafe(self._hear)

    async def _watch_for_hangs(self) -> None:
        """Say so when a run does not come back. A thread cannot be ended from outside, so all else that can be done is to
        send clients elsewhere until it does."""
        told: Run | None = None
        while True:
            await asyncio.sleep(self.hung_s / 4)
            run = self._dispatch.running
            if run is None or run is told or not self._hangs():
                continue
            told = run
            self.metrics.worker_hangs.inc()
            logger.error(
                "inference of %d rows of version %d of %s has not ended after %.3g s, and %.3g s were expected: "
                "the server is not ready until it does",
                len(run.rows),
                run.model.version,
                run.model.name,
                run.hung_after_s,
                run.batch.expected_s,
            )

    def _hangs(self) -> bool:
        run = self._dispatch.running
        return run is not None and time.monotonic() >= run.hung_at_s

    async def _wait(self, until_s: float) -> bool:
        """Until something happens, or until that time. Whether something did."""
        if until_s == math.inf:
            return await self._happened.wait()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._happened.wait(), max(0.0, until_s - self.clock()))
        return self._happened.is_set()

    def _hear(self) -> None:
        """Of all that was decided and run meanwhile. Called by the event loop, whom an error would not concern."""
        try:
            while self._dispatch.turns:
                self._take_note(self._dispatch.turns.popleft())
            self._begin_overdue_audits()
        except Exception as exc:  # noqa: BLE001 (raised again where the engine's errors are handled)
            self._error = exc

    def _hear_or_raise(self) -> None:
        self._hear()
        if self._error is not None:
            raise self._error

    def _take_note(self, turn: Turn) -> None:
        """Count what ran and what begins, and deliver what is decided."""
        self.metrics.decision_seconds.observe(turn.thought_s)
        if (ended := turn.ended) is not None:
            labels = ended.run.model.labels
            if ended.failed:
                self._fail(
                    ended.run.rows, InferenceFailed("the model could not be run on this; the server's log has the cause")
                )
            else:
                self.metrics.profile_ratio.labels(*labels).observe(ended.took_s / ended.run.batch.expected_s)
            if ended.overflowed:
                self._fail(ended.overflowed, InferenceFailed("the model overflowed on this input: its answer is no number"))
        if (run := turn.run) is not None:
            self.metrics.batch_rows.labels(*run.model.labels).observe(len(run.rows))
            self.metrics.block_rows.labels(*run.model.labels).inc(len(run.rows) * len(run.batch.segment.nodes))
        for decision in turn.decisions:
            for row, stopped_by in cast(Sequence[tuple[TicketRow, StoppedBy]], decision.done):
                self._deliver(row, stopped_by, turn.decided_s)
            for row in cast(Sequence[TicketRow], decision.expired):
                self._fail([row], DeadlineExpired("the latency budget ran out in the queue, before any block had run"))
            for row in cast(Sequence[TicketRow], decision.refused):
                if row.ticket is not None:
                    by_s = self._feasible_s(row.model, row.wish, 1)
                    self._dispatch.learn_of_refusal(row.model)
                    self._fail([row], _infeasible(row.deadline_s, by_s, row.ticket.arrived_s))
        for row, latest in ended.told if ended is not None else ():
            ticket = row.ticket
            if ticket is None or ticket.on_answer is None or ticket.done.done() or ticket.answers[row.index] is not None:
                continue  # its client has gone, or was told already that this is the final one
            ticket.on_answer(row.index, latest)
        self.metrics.queue_rows.set(self._dispatch.waiting())
        self._forget_retired()

    def _deliver(self, row: TicketRow, stopped_by: StoppedBy, decided_s: float) -> None:
        """A row has its final answer."""
        assert row.latest is not None
        ticket = row.ticket
        if ticket is not None and ticket.done.done():
            return
        if (row.audited or row.audit is not None) and row.model not in self._retiring:
            self._audits.answered(row, stopped_by, self._drift[row.model])
            self._happened.set()
        if ticket is None:
            return
        latest = row.latest
        answer = RowAnswer(latest.label, latest.confidence, latest.probabilities, latest.path, stopped_by, latest.logits)
        ticket.answers[row.index] = answer
        self.metrics.answers.labels(*row.model.labels, len(answer.path), stopped_by).inc()
        if ticket.on_answer is not None:
            ticket.on_answer(row.index, answer)
        answers = [answer for answer in ticket.answers if answer is not None]
        if len(answers) == len(ticket.answers):
            queue_s = ticket.queue_s or 0.0
            self.metrics.queue_seconds.labels(*row.model.labels).observe(queue_s)
            self.metrics.compute_seconds.labels(*row.model.labels).observe(ticket.compute_s)
            spans = ticket.spans
            if spans is not None:
                spans.insert(0, Timed("queue", ticket.arrived_s, ticket.arrived_s + queue_s))
            ticket.done.set_result(Answer(tuple(answers), queue_s, ticket.compute_s, decided_s, tuple(spans or ())))

    def _begin_overdue_audits(self) -> None:
        while self._audits.overdue(self.clock()):
            self._begin_audit()

    def _begin_audit(self) -> None:
        """Hand the oldest audit to its policy: nobody else needs the device, or it has waited long enough."""
        row = self._audits.take()
        self._dispatch.arrive(row.model, [row], self.clock())
        self._happened.set()

    def _fail(self, rows: Iterable[TicketRow], error: ServiceError) -> None:
        """Refuse the requests of these rows."""
        for row in rows:
            ticket = row.ticket
            if ticket is None:
                self._dispatch.leave(row.model, [row])
            elif not ticket.done.done():
                ticket.done.set_exception(error)
                self._dispatch.leave(ticket.model, ticket.rows)

    def _fail_all(self, error: ServiceError) -> None:
        """Refuse whatever is in flight, and start from nothing: a policy that failed is not trusted with its state."""
        for ticket in self._tickets:
            for row in ticket.rows:
                row.gone, row.place = True, None  # the policy that had them is not asked again
            if not ticket.done.done():
                ticket.done.set_exception(error)
        self._dispatch.turns.clear()
        for model in self._dispatch.models:
            self.add(model)

    def _forget_retired(self) -> None:
        for model in [each for each in self._retiring if self._dispatch.forget(each)]:
            self._retiring.discard(model)
            del self._drift[model]


def _infeasible(deadline_s: float, by_s: float, arrived_s: float) -> DeadlineInfeasible:
    smallest_ms = round(1000 * (by_s - arrived_s), 3)
    return DeadlineInfeasible(
        f"a budget of {1000 * (deadline_s - arrived_s):g} ms cannot be met now: expected at least {smallest_ms:g} ms",
        smallest_feasible_budget_ms=smallest_ms,
    )
