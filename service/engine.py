"""The simple engine: one bounded first-come queue, batches of rows that can run together, one inference thread.

A batch is one segment in one call. Rows that climb come back to the head of the queue between rungs, so each row is
answered when it stops, whoever it shared a batch with, and newcomers can join.

It owns all asyncio state of serving. Routes see the protocol in `service.answers`; the rules of depth are in
`service.policy`; models run behind the `Runner` protocol. So another engine can take its place without touching either
side.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from family.tree import Path
from service.answers import Answer, OnAnswer, RowAnswer
from service.errors import (
    DeadlineExpired,
    DeadlineInfeasible,
    InferenceFailed,
    NotReady,
    QueueFull,
    ServiceError,
)
from service.metrics import Metrics
from service.policy import StoppedBy, Wish, choose_target, least_segment, segment_between, stops_climbing
from service.profile import Segment
from service.repository import ServedModel
from service.runtime import Output, Rows

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Ticket:
    """A request in flight."""

    model: ServedModel
    wish: Wish
    arrived_s: float
    done: asyncio.Future[Answer]
    answers: list[RowAnswer | None]
    on_answer: OnAnswer | None
    queue_s: float | None = None
    compute_s: float = 0.0


@dataclass(slots=True)
class _Item:
    """One row that waits: at the input, or on the ladder, where `source` is the state after the path `before`."""

    ticket: _Ticket
    index: int
    x: Rows
    source: Rows
    before: Path | None = None


@dataclass(frozen=True, slots=True)
class _Step:
    """What a row wants to run next: `segment` leads to the answer of `path`. A row that climbs has no `stopped_by` yet;
    `upcoming` is what it would run after this, if there is anything better."""

    path: Path
    segment: Segment
    stopped_by: StoppedBy | None
    upcoming: Segment | None = None


@dataclass(frozen=True, slots=True)
class _Batch:
    """Rows of one model that run the same segment to the same path, each for its own reason."""

    model: ServedModel
    items: tuple[_Item, ...]
    steps: tuple[_Step, ...]


@dataclass(slots=True)
class Engine:
    """Admits requests, batches their rows, and answers them.

    Args:
        max_batch: rows of one inference.
        max_queue_rows: rows that may wait; a request that does not fit is refused.
        reserve_s: time kept back from every budget to build and send the answer.
        clock: monotonic seconds.
    """

    metrics: Metrics
    max_batch: int
    max_queue_rows: int
    reserve_s: float
    clock: Callable[[], float] = time.monotonic
    _queue: deque[_Item] = field(default_factory=deque)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="inference"))
    _loop_task: asyncio.Task[None] | None = None
    _warm: bool = False
    _stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def ready(self) -> bool:
        """Warm, not stopping, and its loop alive."""
        alive = self._loop_task is not None and not self._loop_task.done()
        return self._warm and alive and not self._stopping.is_set()

    async def start(self, models: Sequence[ServedModel]) -> None:
        """Warm `models` up in the inference thread, then take requests."""
        loop = asyncio.get_running_loop()
        for model in models:
            if self._stopping.is_set():
                return
            await loop.run_in_executor(self._thread, model.warm_up, self.max_batch, self.clock, self._stopping.is_set)
        self._loop_task = asyncio.create_task(self._run_forever(), name="engine")
        self._warm = True

    async def stop(self) -> None:
        """Take no more requests, deliver the batch that runs, refuse what waits."""
        self._stopping.set()
        self._arrived.set()
        if self._loop_task is not None:
            await self._loop_task
        self._fail_waiting(NotReady("the server is shutting down"))
        await asyncio.to_thread(self._thread.shutdown)

    def require_room(self, rows: int) -> None:
        """Check that `rows` more may wait now, before work is put into decoding them.

        Raises:
            NotReady: the engine is warming up or shutting down.
            QueueFull: too many rows wait.
        """
        if not self.ready:
            raise NotReady("the server is warming up or shutting down: ask again in a second")
        waiting = len(self._queue)
        if waiting + rows > self.max_queue_rows:
            raise QueueFull(f"{waiting} rows wait already and at most {self.max_queue_rows} may, got {rows} more")

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
        done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        ticket = _Ticket(model, wish, arrived_s, done, [None] * len(x), on_answer)
        self._require_feasible(ticket, self.clock(), len(self._queue) + len(x))
        self._queue.extend(_Item(ticket, index, row, row) for index, row in enumerate(x))
        self.metrics.requests.labels(model.name).inc()
        self.metrics.queue_rows.set(len(self._queue))
        self._arrived.set()
        try:
            return await ticket.done
        except asyncio.CancelledError:
            self._queue = deque(item for item in self._queue if item.ticket is not ticket)
            self.metrics.queue_rows.set(len(self._queue))
            raise

    async def _run_forever(self) -> None:
        """Never ends but by `stop`: a surprise fails the requests that it meets and is logged."""
        while not self._stopping.is_set():
            try:
                await self._run_once()
            except Exception:
                logger.exception("the engine met an error of its own; the %d rows that wait are refused", len(self._queue))
                self._fail_waiting(InferenceFailed("the server met an error of its own; its log has the cause"))

    async def _run_once(self) -> None:
        batch = self._next_batch()
        self.metrics.queue_rows.set(len(self._queue))
        if batch is None:
            self._arrived.clear()
            await self._arrived.wait()
            return
        self.metrics.batch_rows.labels(batch.model.name).observe(len(batch.items))
        self.metrics.block_rows.labels(batch.model.name).inc(len(batch.items) * len(batch.steps[0].segment.nodes))
        start = self.clock()
        try:
            output = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, batch)
            self._deliver(batch, output, self.clock() - start)
        except Exception:
            logger.exception("inference of %d rows of %s failed", len(batch.items), batch.model.name)
            for item in batch.items:
                _fail(item.ticket, InferenceFailed("the model could not be run on this; the server's log has the cause"))

    def _next_batch(self) -> _Batch | None:
        """The oldest waiting row and the others that want to run the same. Leaves out who has gone or expired."""
        now = self.clock()
        size = min(len(self._queue), self.max_batch)
        steps: dict[tuple[int, Path | None], _Step] = {}  # rows of a request at one place want the same
        head: tuple[ServedModel, Path, Segment] | None = None
        chosen: list[tuple[_Item, _Step]] = []
        kept: deque[_Item] = deque()
        waiting = iter(self._queue)  # which stays whole until this batch stands
        for item in waiting:
            ticket = item.ticket
            if ticket.done.done():
                continue
            if ticket.wish.deadline_s is not None and now >= ticket.wish.deadline_s and ticket.queue_s is None:
                _fail(ticket, DeadlineExpired("the latency budget ran out in the queue, before any block had run"))
                continue
            try:
                if ticket.queue_s is None:
                    self._require_feasible(ticket, now, max(size, len(ticket.answers)))
            except DeadlineInfeasible as error:
                _fail(ticket, error)
                continue
            step = steps.get((id(ticket), item.before))
            if step is None:
                step = steps[id(ticket), item.before] = self._step(item, now, size)
            key = (ticket.model, step.path, step.segment)
            head = head or key
            if key != head:
                kept.append(item)
                continue
            chosen.append((item, step))
            if len(chosen) == self.max_batch:
                break
        kept.extend(waiting)
        self._queue = kept
        if head is None:
            return None
        for item, _ in chosen:
            if item.ticket.queue_s is None:
                item.ticket.queue_s = now - item.ticket.arrived_s
        items, wanted = zip(*chosen, strict=True)
        return _Batch(head[0], items, wanted)

    def _require_feasible(self, ticket: _Ticket, now: float, rows: int) -> None:
        """A strict request must be able to have its least answer in time, by the profile's prediction, if `rows` are
        served before it or with it as it would be."""
        wish, model = ticket.wish, ticket.model
        if not wish.strict or wish.deadline_s is None:
            return
        segment = least_segment(model.manifest, wish)
        batches, rest = divmod(rows, self.max_batch)
        needed_s = batches * model.latency_s(segment, self.max_batch) + (model.latency_s(segment, rest) if rest else 0.0)
        ends_s = now + needed_s + self.reserve_s
        if ends_s > wish.deadline_s:
            smallest_ms = round(1000 * (ends_s - ticket.arrived_s), 3)
            budget_ms = 1000 * (wish.deadline_s - ticket.arrived_s)
            raise DeadlineInfeasible(
                f"a budget of {budget_ms:g} ms cannot be met now: expected at least {smallest_ms:g} ms",
                smallest_feasible_budget_ms=smallest_ms,
            )

    def _step(self, item: _Item, now: float, rows: int) -> _Step:
        model, wish = item.ticket.model, item.ticket.wish
        if wish.exit_at is not None:
            climb = model.manifest.climb
            target, *further = climb if item.before is None else climb[climb.index(item.before) + 1 :]
            upcoming = segment_between(target, further[0]) if further else None
            return _Step(target, segment_between(item.before, target), None, upcoming)
        slack_s = None if wish.deadline_s is None else wish.deadline_s - now - self.reserve_s
        chosen = choose_target(model.manifest, wish, slack_s, rows, model.latency_s)
        return _Step(chosen.path, Segment(chosen.path, embed=True), chosen.stopped_by)

    def _run(self, batch: _Batch) -> Output:
        """In the inference thread."""
        segment = batch.steps[0].segment
        source = np.stack([item.x if segment.embed else item.source for item in batch.items])
        keep_state = any(step.upcoming is not None and not step.upcoming.embed for step in batch.steps)
        return batch.model.runner.run(segment.nodes, source, embed=segment.embed, keep_state=keep_state)

    def _deliver(self, batch: _Batch, output: Output, compute_s: float) -> None:
        """Give the rows that are done their answers; the others go back to the head of the queue."""
        assert output.logits is not None
        model, path = batch.model, batch.steps[0].path
        now = self.clock()
        going_on: list[_Item] = []
        tickets = {id(item.ticket): item.ticket for item in batch.items}.values()
        for ticket in tickets:
            ticket.compute_s += compute_s
        probabilities = _probabilities(model, path, output.logits)
        labels = probabilities.argmax(axis=1)
        for row, (item, step) in enumerate(zip(batch.items, batch.steps, strict=True)):
            if item.ticket.done.done():
                continue  # its client has gone, or another of its rows failed
            label = int(labels[row])
            confidence = float(probabilities[row, label])
            stopped_by = step.stopped_by or stops_climbing(
                item.ticket.wish, confidence, step.upcoming, now, self.reserve_s, len(batch.items), model.latency_s
            )
            answer = RowAnswer(label, confidence, probabilities[row], path, stopped_by, output.logits[row])
            if item.ticket.on_answer is not None:
                item.ticket.on_answer(item.index, answer)
            if stopped_by is None:
                item.before = path
                item.source = item.x if output.state is None else output.state[row]
                going_on.append(item)
            else:
                item.ticket.answers[item.index] = answer
                self.metrics.answers.labels(model.name, len(path), stopped_by).inc()
        self._queue.extendleft(reversed(going_on))
        for ticket in tickets:
            rows = tuple(answer for answer in ticket.answers if answer is not None)
            if len(rows) == len(ticket.answers) and not ticket.done.done():
                self.metrics.queue_seconds.labels(model.name).observe(ticket.queue_s or 0.0)
                self.metrics.compute_seconds.labels(model.name).observe(ticket.compute_s)
                ticket.done.set_result(Answer(rows, ticket.queue_s or 0.0, ticket.compute_s))

    def _fail_waiting(self, error: ServiceError) -> None:
        while self._queue:
            _fail(self._queue.popleft().ticket, error)


def _probabilities(model: ServedModel, path: Path, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """`softmax(logits / temperature of the path)`, `(rows, classes) float32`."""
    scaled = logits / np.float32(model.manifest.offered[path].temperature)
    scaled -= scaled.max(axis=1, keepdims=True)
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(axis=1, keepdims=True)
    return scaled


def _fail(ticket: _Ticket, error: ServiceError) -> None:
    if not ticket.done.done():
        ticket.done.set_exception(error)
