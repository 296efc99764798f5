"""Admits requests, has their rows answered, and delivers the answers: what of serving happens on the event loop.

What runs when is decided in `service.policy`, which `service.dispatch` asks; models run in the thread of `service.worker`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from service.answers import Answer, OnAnswer
from service.audits import Audits
from service.delivery import Delivery, infeasible
from service.dispatch import Dispatch, Ended, Run, Turn
from service.drift import DriftWatch
from service.errors import (
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
from service.runtime import Output, Rows
from service.tickets import Ticket, TicketRow
from service.worker import Worker, WorkerDied

logger = logging.getLogger(__name__)

_ON_LOOP_S = 0.001
"""A run that takes no longer, for the only request there is, runs on the event loop: the way to the inference thread and
back takes about as long, and so does reading a request. (Should it hang, so does the loop, and probes get no answer.)"""

_RUN_FAILED = "inference of %d rows of %s failed"
_SURPRISE = "the engine met an error of its own; %d rows are refused"


@dataclass(slots=True)
class Engine:
    """Admits requests, batches their rows, and answers them. Made and used on one event loop.

    Args:
        max_batch: rows of one inference.
        max_queue_rows: rows that may wait; a request that does not fit is refused.
        reserve_s: time kept back from every budget to build and send the answer.
        hung_s: the least time after which a run is taken for hung, in real time.
        unread: how many requests wait to be read.
        trace: whether answers carry the spans of their requests.
        clock: monotonic seconds.
    """

    metrics: Metrics
    max_batch: int
    max_queue_rows: int
    reserve_s: float
    unread: Callable[[], int] = lambda: 0
    hung_s: float = 10.0
    trace: bool = False
    clock: Callable[[], float] = time.monotonic
    _dispatch: Dispatch = field(init=False)
    _audits: Audits = field(init=False)
    _delivery: Delivery = field(init=False)
    _drift: dict[ServedModel, DriftWatch] = field(default_factory=dict)
    _retiring: set[ServedModel] = field(default_factory=set)
    _tickets: set[Ticket] = field(default_factory=set)
    _happened: asyncio.Event = field(default_factory=asyncio.Event)
    _order: itertools.count[int] = field(default_factory=itertools.count)
    _worker: Worker | None = None
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _warm: bool = False
    _well: bool = True
    _ended: Ended | None = None
    _turn: Turn | None = None  # decided, and not yet carried out
    _idle: bool = False
    _stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._dispatch = Dispatch(self.clock, self.hung_s)
        self._audits = Audits(self._order.__next__, self.clock)
        self._delivery = Delivery(self._dispatch, self.metrics, self._on_final)
        self.metrics.queue_rows.set_function(self._dispatch.waiting)

    @property
    def ready(self) -> bool:
        """Warm, not stopping, its loop and its thread alive, and no run hung."""
        alive = bool(self._tasks) and not self._tasks[0].done()
        return self._warm and self._well and alive and not self._stopping.is_set() and not self._hangs()

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._stopping.is_set()

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight."""
        return not self._tickets and not self.unread()

    def in_hand(self) -> list[float]:
        """When the budgets end of the requests that have one which still runs, and no answer yet: of HTTP's, as calls over
        gRPC have a gate of their own; of none while the engine cannot answer, and says so."""
        if not self.ready:
            return []
        now_s = self.clock()
        last = [ticket.rows[-1] for ticket in self._tickets if ticket.on_loop and ticket.rows]
        return [row.deadline_s for row in last if row.answered is None and now_s < row.deadline_s < math.inf]

    async def start(self, models: Sequence[ServedModel]) -> None:
        """Warm `models` up in the inference thread, then take requests."""
        self._worker = Worker("inference", self.metrics.worker_deaths.inc)
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
        """Take no more requests, deliver the batch that runs and whatever has an answer, refuse the rest. A run that hangs
        is not waited for any longer than it takes to say that it does."""
        self._stopping.set()
        self._happened.set()
        if self._tasks:
            running, watching = self._tasks
            while not running.done() and not self._hangs():
                await asyncio.wait([running], timeout=self.hung_s / 4)
            if not running.done():
                logger.error("a run hangs: the server ends without it")
                running.cancel()
            watching.cancel()
            await asyncio.gather(watching, running, return_exceptions=True)
        self._deliver(self._dispatch.settle())
        self._fail_all(NotReady("the server is shutting down"))
        if self._worker is not None:
            await asyncio.to_thread(self._worker.stop, self.hung_s if self._dispatch.running is None else 0)

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
        self,
        model: ServedModel,
        x: Rows,
        wish: Wish,
        arrived_s: float,
        on_answer: OnAnswer | None = None,
        *,
        on_loop: bool = True,
    ) -> Answer:
        """Answer the rows of `x (rows, *input_shape) float32`, which arrived at `arrived_s` on the engine's clock. With
        `on_loop` a short run for them, if they are alone, holds up the event loop.

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
            by_s = self._dispatch.feasible_s(model, wish, len(x))
            if by_s > wish.deadline_s:
                self._dispatch.learn_of_refusal(model)
                raise infeasible(wish.deadline_s, by_s, arrived_s)
        wish, audited = self._drift[model].admit(wish)
        done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        ticket = Ticket(model, arrived_s, done, [None] * len(x), on_answer, on_loop, [] if self.trace else None)
        chosen = secrets.randbelow(len(x)) if audited else -1  # one row: rows of a request may be much alike
        for index, row in enumerate(x):
            waits = TicketRow(wish, now, next(self._order), model=model, x=row, ticket=ticket, index=index)
            waits.audited = index == chosen
            ticket.rows.append(waits)
        self._tickets.add(ticket)
        for waits in ticket.rows:
            self._dispatch.arrive(waits, now)
        self.metrics.of(self.metrics.requests, *model.labels).inc()
        try:
            if on_loop and self._is_alone():
                await asyncio.sleep(0)  # the loop reads who came with it
            if not (on_loop and self._is_alone() and self._run_here()):
                self._happened.set()
            return await done
        except asyncio.CancelledError:
            for waits in ticket.rows:
                if waits.audited and ticket.answers[waits.index] is None and done.cancelled() and self._audits_of(model):
                    self._audits.cut_short(waits)  # whoever leaves may do so because it takes long
                    self._happened.set()
            self._delivery.leave(ticket)
            raise
        finally:
            self._tickets.discard(ticket)
            ticket.rows.clear()  # which have the ticket
            del done, ticket, waits  # an error has this frame: nothing is left for the garbage collector

    def _require_policy(self, model: ServedModel) -> None:
        if model not in self._drift:
            if model.profile is None:
                raise NotReady("the model is warming up: ask again in a second")
            self.add(model)  # it was replaced and forgotten while this request was being read
            self.retire(model)

    async def _run_forever(self) -> None:
        """Never ends but by `stop`: a surprise fails the requests that it meets and is logged."""
        while self._turn is not None or not self._stopping.is_set():
            try:
                await self._run_once()
            except Exception:
                logger.exception(_SURPRISE, self._dispatch.waiting())
                self._start_afresh()
                self._happened.clear()
                if not self._stopping.is_set():
                    await self._happened.wait()

    async def _run_once(self) -> None:
        self._happened.clear()
        while self._audits.overdue(self.clock()):
            self._begin_audit()
        pending, self._turn = self._turn, None
        turn = pending or self._decide()
        if (run := turn.run) is None:
            self._deliver(turn)
            if pending is not None:
                return  # who came since is still to be decided about
            del turn, run  # an idle engine holds on to no model that is forgotten
            if self._dispatch.waiting() and self.unread():
                await asyncio.sleep(0)  # whoever waits does so only until the crowd is read
            elif self._audits:
                for _ in range(min(self.max_batch, len(self._audits))):
                    self._begin_audit()
            else:
                await self._wait(self._dispatch.wake_s())
            return
        assert self._worker is not None
        # Begun before answers are built, so that the thread need not wait for that.
        running = None if self._is_short(run) else self._worker.run(partial(self._dispatch.infer, run))
        self._deliver(turn)
        try:
            output, ran_s = await self._infer(run, running)
        except Exception:
            logger.exception(_RUN_FAILED, len(run.rows), run.model.name)
            self._failed(run)
        else:
            self._finish(run, output, ran_s)
        finally:
            self._well = True

    def _is_alone(self) -> bool:
        """Whether nothing is in hand but one request, which nobody has decided about."""
        return self._idle and self._turn is None and len(self._tickets) == 1

    def _run_here(self) -> bool:
        """Run the first segment of the only request there is at once if that is short. Returns whether it has its answer.

        Waking the engine and coming back would take about as long. What else there is to do is left to the engine, so that
        between two runs the loop reads who came.
        """
        try:
            self._turn = self._decide()
            if (run := self._turn.run) is None or not self._is_short(run):
                return False
            self._deliver(self._turn)
            try:
                output, ran_s = self._dispatch.infer(run)
            except Exception:
                logger.exception(_RUN_FAILED, len(run.rows), run.model.name)
                self._failed(run)
            else:
                self._finish(run, output, ran_s)
            self._turn = self._decide()
            if self._turn.run is not None or self._dispatch.waiting():
                return False
            self._deliver(self._turn)
            self._turn = None
        except Exception:
            logger.exception(_SURPRISE, self._dispatch.waiting())
            self._start_afresh()
        return not self._audits

    def _decide(self) -> Turn:
        turn = self._dispatch.decide(crowded=self.unread() > 0)
        self.metrics.decision_seconds.observe(turn.thought_s)
        if turn.run is not None:
            labels = turn.run.model.labels
            self.metrics.of(self.metrics.batch_rows, *labels).observe(len(turn.run.rows))
            self.metrics.of(self.metrics.block_rows, *labels).inc(len(turn.run.rows) * len(turn.run.batch.segment.nodes))
        return turn

    async def _infer(self, run: Run, running: asyncio.Future[tuple[Output, float]] | None) -> tuple[Output, float]:
        """What a run brings that the inference thread has begun with; or one for the loop."""
        if running is None:
            await asyncio.sleep(0)  # between two such runs the loop reads who came
            return self._dispatch.infer(run)
        try:
            return await running
        except WorkerDied:  # perhaps not of this batch: once more
            self._well = False
            assert self._worker is not None
            return await self._worker.run(partial(self._dispatch.infer, run))

    def _finish(self, run: Run, output: Output, ran_s: float) -> None:
        self._ended = self._dispatch.finish(run, output, ran_s)
        self.metrics.of(self.metrics.profile_ratio, *run.model.labels).observe(self._ended.took_s / run.batch.expected_s)
        if overflowed := self._ended.overflowed:
            self._delivery.fail(overflowed, InferenceFailed("the model overflowed on this input: its answer is no number"))

    def _failed(self, run: Run) -> None:
        self._dispatch.failed()
        self._delivery.fail(run.rows, InferenceFailed("the model could not be run on this; the server's log has the cause"))

    def _start_afresh(self) -> None:
        self._dispatch.failed()
        self._fail_all(InferenceFailed("the server met an error of its own; its log has the cause"))

    def _is_short(self, run: Run) -> bool:
        """Whether it is quicker done here than told to the inference thread, and nobody else is kept waiting by that."""
        profile = run.model.profile
        assert profile is not None
        if len(self._tickets) != 1 or not next(iter(self._tickets)).on_loop:
            return False
        return profile.typical_s(run.batch.segment, len(run.rows)) <= _ON_LOOP_S

    async def _watch_for_hangs(self) -> None:
        """Say so when a run does not come back. A thread cannot be ended from outside, so all else that can be done is to
        send clients elsewhere until it does."""
        told: Run | None = None
        while True:
            await asyncio.sleep(self.hung_s / 4)
            run = self._dispatch.running
            if run is None:
                told = None  # which has a model that may be forgotten
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

    async def _wait(self, until_s: float) -> None:
        """Until something happens, or until that time."""
        self._idle = True
        try:
            if until_s == math.inf:
                await self._happened.wait()
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._happened.wait(), max(0.0, until_s - self.clock()))
        finally:
            self._idle = False

    def _deliver(self, turn: Turn) -> None:
        """Let those who wait know what is decided, and what is known on the way."""
        ended, self._ended = self._ended, None
        self._delivery.deliver(turn, ended.told if ended is not None else ())
        self._forget_retired()

    def _on_final(self, row: TicketRow, stopped_by: StoppedBy) -> None:
        if (row.audited or row.audit is not None) and self._audits_of(row.model):
            self._audits.answered(row, stopped_by, self._drift[row.model])
            self._happened.set()

    def _audits_of(self, model: ServedModel) -> bool:
        """Whether a model is audited still: not once it is retired."""
        return model in self._drift and model not in self._retiring

    def _begin_audit(self) -> None:
        """Hand the oldest audit to its policy: nobody else needs the device, or it has waited long enough."""
        row = self._audits.take()
        self._dispatch.arrive(row, self.clock())

    def _fail_all(self, error: ServiceError) -> None:
        """Refuse whatever is in flight, and start from nothing: a policy that failed is not trusted with its state."""
        for ticket in self._tickets:
            for row in ticket.rows:
                row.gone, row.place = True, None  # the policy that had them is not asked again
            if not ticket.done.done():
                ticket.done.set_exception(error)
        self._ended = self._turn = None
        for model in self._dispatch.models:
            self.add(model)

    def _forget_retired(self) -> None:
        for model in [each for each in self._retiring if self._dispatch.forget(each)]:
            self._retiring.discard(model)
            del self._drift[model]
