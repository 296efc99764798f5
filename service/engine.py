"""The loop that carries the policies' decisions out: admits requests, runs batches, delivers answers.

It owns all asyncio state of serving. Which rows run when, and through which blocks, is decided in `service.policy`;
models run behind the `Runner` protocol, in the thread of `service.worker`; routes see the protocol in
`service.answers`.
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

import numpy as np
from numpy.typing import NDArray

from family.tree import Path, format_path
from service.answers import Answer, OnAnswer, RowAnswer
from service.audits import Audits
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
from service.policy.scheduler import Scheduler
from service.policy.state import Batch, Decision, Policy, Step
from service.policy.wish import StoppedBy, Wish
from service.repository import ServedModel
from service.runtime import Output, Rows
from service.tickets import Ticket, TicketRow
from service.tracing import Timed
from service.worker import Worker, WorkerDied

logger = logging.getLogger(__name__)

_MOST_GUESSES = 8
"""Of the smallest budget that can be met: each passes all rows that were due by the one before."""

_HUNG_RATIO = 100
"""A run that takes so many times what it was expected to is no slow one."""


@dataclass(slots=True)
class Engine:
    """Admits requests, batches their rows, and answers them. Made and used on one event loop.

    Args:
        max_batch: rows of one inference.
        max_queue_rows: rows that may wait; a request that does not fit is refused.
        reserve_s: time kept back from every budget to build and send the answer.
        hung_s: the least time after which a run is taken for hung, by the event loop's clock.
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
    _scheduler: Scheduler[ServedModel] = field(default_factory=Scheduler)
    _drift: dict[ServedModel, DriftWatch] = field(default_factory=dict)
    _retiring: set[ServedModel] = field(default_factory=set)
    _tickets: set[Ticket] = field(default_factory=set)
    _untold: list[TicketRow] = field(default_factory=list)  # with an answer that its client may want to hear of
    _happened: asyncio.Event = field(default_factory=asyncio.Event)
    _order: itertools.count[int] = field(default_factory=itertools.count)
    _audits: Audits = field(init=False)
    _worker: Worker | None = None
    _loop_task: asyncio.Task[None] | None = None
    _busy_until_s: float = 0.0
    _warm: bool = False
    _well: bool = True
    _stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._audits = Audits(self._order.__next__, self.clock)

    @property
    def ready(self) -> bool:
        """Warm, not stopping, its loop and its thread alive, and no run hung."""
        alive = self._loop_task is not None and not self._loop_task.done()
        return self._warm and self._well and alive and not self._stopping.is_set()

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._stopping.is_set()

    async def start(self, models: Sequence[ServedModel]) -> None:
        """Warm `models` up in the inference thread, then take requests."""
        self._worker = Worker("inference", self.metrics.worker_deaths.inc)
        for model in models:
            if self._stopping.is_set():
                return
            await self._worker.run(partial(model.warm_up, self.max_batch, self.clock, self._stopping.is_set))
            if model.profile is not None:
                self.add(model)
        self._loop_task = asyncio.create_task(self._run_forever(), name="engine")
        self._warm = not self._stopping.is_set()

    def add(self, model: ServedModel) -> None:
        """Serve a model that is warm."""
        assert model.profile is not None
        policy = make_policy(model.settings.policy, model.offer(model.profile, self.reserve_s))
        self._scheduler.policies[model] = policy
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
        if self._loop_task is not None:
            await self._loop_task
        now = self.clock()
        self._settle([policy.settle(now, math.inf) for policy in self._scheduler.policies.values()], now)
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
        waiting = self._scheduler.waiting()
        if waiting + rows > self.max_queue_rows:
            raise QueueFull(f"{waiting} rows wait already and at most {self.max_queue_rows} may, got {rows} more")

    def foresee(self, model: ServedModel, wish: Wish, rows: int) -> tuple[Step, ...]:
        """The answers that such a request could expect if it came now, on the engine's clock.

        Raises:
            NotReady: the model is not warm.
        """
        return self._policy(model).foresee(wish, rows, max(self.clock(), self._busy_until_s))

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
        policy = self._policy(model)
        now = self.clock()
        if wish.strict and wish.deadline_s is not None:
            by_s = self._feasible_s(model, wish, len(x))
            if by_s > wish.deadline_s:
                self._learn_of_refusal(model)
                raise _infeasible(wish.deadline_s, by_s, arrived_s)
        wish, audited = self._drift[model].admit(wish)
        done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        ticket = Ticket(model, arrived_s, done, [None] * len(x), on_answer, [] if self.trace else None)
        chosen = secrets.randbelow(len(x)) if audited else -1  # one row: rows of a request may be much alike
        for index, row in enumerate(x):
            waits = TicketRow(wish, now, next(self._order), model=model, x=row, ticket=ticket, index=index)
            waits.audited = index == chosen
            ticket.rows.append(waits)
        for waiting in ticket.rows:
            policy.arrive(waiting, now)
        self._tickets.add(ticket)
        self.metrics.requests.labels(*model.labels).inc()
        self.metrics.queue_rows.set(self._scheduler.waiting())
        self._happened.set()
        try:
            return await done
        except asyncio.CancelledError:
            for row in ticket.rows:
                if row.audited and ticket.answers[row.index] is None and done.cancelled():
                    self._audits.cut_short(row)  # whoever leaves may do so because it takes long
                    self._happened.set()
            self._leave(ticket)
            self.metrics.queue_rows.set(self._scheduler.waiting())
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

    def _learn_of_refusal(self, model: ServedModel) -> None:
        """An idle server that refuses must not go on doing so because of how slow it once was."""
        if model.profile is not None and self.clock() >= self._busy_until_s and not self._scheduler.waiting():
            model.profile.relax()

    def _policy(self, model: ServedModel) -> Policy:
        if model not in self._scheduler.policies:
            if model.profile is None:
                raise NotReady("the model is warming up: ask again in a second")
            self.add(model)  # it was replaced and forgotten while this request was being read
            self.retire(model)
        return self._scheduler.policies[model]

    async def _run_forever(self) -> None:
        """Never ends but by `stop`: a surprise fails the requests that it meets and is logged."""
        while not self._stopping.is_set():
            try:
                await self._run_once()
            except Exception:
                logger.exception("the engine met an error of its own; %d rows are refused", self._scheduler.waiting())
                self._fail_all(InferenceFailed("the server met an error of its own; its log has the cause"))
                self._happened.clear()
                if not self._stopping.is_set():
                    await self._happened.wait()

    async def _run_once(self) -> None:
        self._happened.clear()
        start = self.clock()
        while self._audits.overdue(start):
            self._begin_audit(start)
        decisions, model, batch = self._scheduler.decide(start)
        self.metrics.decision_seconds.observe(self.clock() - start)
        if batch is None or model is None:
            self._settle(decisions, start)
            self._forget_retired(None)
            del decisions, model, batch  # an idle engine holds on to no model that is forgotten
            if self._audits:
                for _ in range(min(self.max_batch, len(self._audits))):
                    self._begin_audit(start)
            else:
                await self._wait(self._scheduler.wake_s())
            return
        assert self._worker is not None
        worker, rows = self._worker, cast(Sequence[TicketRow], batch.rows)
        self._busy_until_s = start + batch.expected_s
        self.metrics.batch_rows.labels(*model.labels).observe(len(rows))
        self.metrics.block_rows.labels(*model.labels).inc(len(rows) * len(batch.segment.nodes))
        job = self._job(model, batch, rows)
        running = worker.run(job)  # before answers are built, so that the thread need not wait for that
        self._settle(decisions, start)
        self._forget_retired(model)
        hung_s = max(self.hung_s, _HUNG_RATIO * batch.expected_s)
        watchdog = asyncio.get_running_loop().call_later(hung_s, self._hangs, model, batch, hung_s)
        try:
            try:
                output, ran_s = await running
            except WorkerDied:  # perhaps not of this batch: once more
                self._well = False
                output, ran_s = await worker.run(job)
        except Exception:
            logger.exception("inference of %d rows of %s failed", len(rows), model.name)
            self._fail(rows, InferenceFailed("the model could not be run on this; the server's log has the cause"))
            return
        finally:
            watchdog.cancel()
            self._well, self._busy_until_s = True, 0.0
        took_s = self.clock() - start
        assert model.profile is not None
        model.profile.observe(batch.segment, len(rows), ran_s, max(0.0, took_s - ran_s))
        self.metrics.profile_ratio.labels(*model.labels).observe(took_s / batch.expected_s)
        self._finish(model, batch, rows, output, start)

    def _hangs(self, model: ServedModel, batch: Batch, after_s: float) -> None:
        """A run does not come back. A thread cannot be ended from outside, so all that can be done is to say so, and to
        send clients elsewhere until it does."""
        self._well = False
        self.metrics.worker_hangs.inc()
        logger.error(
            "inference of %d rows of version %d of %s has not ended after %.3g s, and %.3g s were expected: "
            "the server is not ready until it does",
            len(batch.rows),
            model.version,
            model.name,
            after_s,
            batch.expected_s,
        )

    async def _wait(self, until_s: float) -> None:
        """Until something happens, or until that time."""
        if until_s == math.inf:
            await self._happened.wait()
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(self._happened.wait(), max(0.0, until_s - self.clock()))

    def _job(self, model: ServedModel, batch: Batch, rows: Sequence[TicketRow]) -> Callable[[], tuple[Output, float]]:
        """What the inference thread does for a batch, and the seconds that it took to."""
        segment = batch.segment

        def job() -> tuple[Output, float]:
            begun_s = self.clock()
            source = np.stack([row.x if segment.embed else cast(Rows, row.state) for row in rows])
            output = model.runner.run(
                segment.nodes, source, embed=segment.embed, predict=batch.predict, keep_state=batch.keep_state
            )
            return output, self.clock() - begun_s

        return job

    def _finish(self, model: ServedModel, batch: Batch, rows: Sequence[TicketRow], output: Output, start: float) -> None:
        """Note the answers that a batch has brought, and tell the policy."""
        now = self.clock()
        ends = [len(row.at) * (not batch.segment.embed) + len(batch.segment.nodes) == len(row.target) for row in rows]
        confidences = [0.0] * len(rows)
        if output.logits is not None:
            paths = [row.target if end else model.manifest.reference for row, end in zip(rows, ends, strict=True)]
            probabilities = _probabilities(model, paths, output.logits)
            labels = probabilities.argmax(axis=1).tolist()
            confidences = probabilities.max(axis=1).tolist()
            broken = [row for row, confidence in zip(rows, confidences, strict=True) if not math.isfinite(confidence)]
            self._fail(broken, InferenceFailed("the model overflowed on this input: its answer is no number"))
            confidences = [confidence if math.isfinite(confidence) else 0.0 for confidence in confidences]
        for ticket in {id(row.ticket): row.ticket for row in rows if row.ticket is not None}.values():
            if ticket.queue_s is None:
                ticket.queue_s = start - ticket.arrived_s
            ticket.compute_s += now - start
            if ticket.spans is not None:
                attributes: dict[str, str | int] = {"hbll.nodes": format_path(batch.segment.nodes), "hbll.rows": len(rows)}
                ticket.spans.append(Timed("segment", start, now, attributes))
        for place, row in enumerate(rows):
            row.state = None if output.state is None else output.state[place]
            if ends[place]:
                assert output.logits is not None
                row.latest = RowAnswer(
                    labels[place], confidences[place], probabilities[place], row.target, None, output.logits[place]
                )
                if row.ticket is not None and row.ticket.on_answer is not None:
                    self._untold.append(row)
        self._scheduler.policies[model].finished(batch, confidences, now)

    def _settle(self, decisions: Iterable[Decision], decided_s: float) -> None:
        """Deliver what is decided."""
        for decision in decisions:
            for row, stopped_by in cast(Sequence[tuple[TicketRow, StoppedBy]], decision.done):
                self._deliver(row, stopped_by, decided_s)
            for row in cast(Sequence[TicketRow], decision.expired):
                self._fail([row], DeadlineExpired("the latency budget ran out in the queue, before any block had run"))
            for row in cast(Sequence[TicketRow], decision.refused):
                if row.ticket is not None:
                    by_s = self._feasible_s(row.model, row.wish, 1)
                    self._learn_of_refusal(row.model)
                    self._fail([row], _infeasible(row.deadline_s, by_s, row.ticket.arrived_s))
        for row in self._untold:
            ticket = row.ticket
            if ticket is None or ticket.on_answer is None or ticket.done.done() or ticket.answers[row.index] is not None:
                continue  # its client has gone, or was told already that this is the final one
            assert row.latest is not None
            ticket.on_answer(row.index, row.latest)
        self._untold.clear()
        self.metrics.queue_rows.set(self._scheduler.waiting())

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

    def _begin_audit(self, now: float) -> None:
        """Hand the oldest audit to its policy: nobody else needs the device, or it has waited long enough."""
        row = self._audits.take()
        self._scheduler.policies[row.model].arrive(row, now)

    def _fail(self, rows: Iterable[TicketRow], error: ServiceError) -> None:
        """Refuse the requests of these rows."""
        for row in rows:
            ticket = row.ticket
            if ticket is None:
                self._scheduler.policies[row.model].leave(row)
            elif not ticket.done.done():
                ticket.done.set_exception(error)
                self._leave(ticket)

    def _leave(self, ticket: Ticket) -> None:
        """Take all rows of a request out of the policy."""
        policy = self._scheduler.policies.get(ticket.model)
        if policy is None:  # forgotten, after its answer and before its client's departure was known
            return
        for row in ticket.rows:
            policy.leave(row)

    def _fail_all(self, error: ServiceError) -> None:
        """Refuse whatever is in flight, and start from nothing: a policy that failed is not trusted with its state."""
        for ticket in self._tickets:
            for row in ticket.rows:
                row.gone, row.place = True, None  # the policy that had them is not asked again
            if not ticket.done.done():
                ticket.done.set_exception(error)
        for model in list(self._scheduler.policies):
            self.add(model)
        self._untold.clear()

    def _forget_retired(self, running: ServedModel | None) -> None:
        policies = self._scheduler.policies
        for model in [each for each in self._retiring if each is not running and not policies[each].waiting()]:
            self._retiring.discard(model)
            del policies[model], self._drift[model]


def _probabilities(model: ServedModel, paths: Sequence[Path], logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """`softmax(logits / temperature of each row's path)`, `(rows, classes) float32`."""
    offered = model.manifest.offered
    temperatures = np.array([[offered[path].temperature] for path in paths], np.float32)
    scaled: NDArray[np.float32] = (logits / temperatures).astype(np.float32, copy=False)
    scaled -= scaled.max(axis=1, keepdims=True)
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(axis=1, keepdims=True)
    return scaled


def _infeasible(deadline_s: float, by_s: float, arrived_s: float) -> DeadlineInfeasible:
    smallest_ms = round(1000 * (by_s - arrived_s), 3)
    return DeadlineInfeasible(
        f"a budget of {1000 * (deadline_s - arrived_s):g} ms cannot be met now: expected at least {smallest_ms:g} ms",
        smallest_feasible_budget_ms=smallest_ms,
    )
