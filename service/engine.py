"""The simple engine: one bounded first-come queue, batches of rows that can run together, one inference thread.

It owns all asyncio state of serving. Routes see `submit`; the rules of depth are in `service.policy`; models run
behind the `Runner` protocol. So another engine can take its place without touching either side.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from family.tree import Path
from service.errors import DeadlineExpired, InferenceFailed, NotReady, QueueFull, ServiceError
from service.metrics import Metrics
from service.policy import StoppedBy, Target, Wish, choose_target, segment_between
from service.repository import ServedModel
from service.runtime import Rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RowAnswer:
    """One row's answer: `probabilities (classes,) float32`, temperature-scaled, their `argmax` and its probability."""

    label: int
    confidence: float
    probabilities: NDArray[np.float32]
    path: Path
    stopped_by: StoppedBy


@dataclass(frozen=True, slots=True)
class Answer:
    """A request's answer: one entry per row in the order they came, and where its time went."""

    rows: tuple[RowAnswer, ...]
    queue_s: float
    compute_s: float


@dataclass(slots=True)
class _Ticket:
    """A request in flight."""

    model: ServedModel
    wish: Wish
    arrived_s: float
    done: asyncio.Future[Answer]
    answers: list[RowAnswer | None]
    queue_s: float | None = None
    compute_s: float = 0.0


@dataclass(slots=True)
class _Item:
    """One row that waits."""

    ticket: _Ticket
    index: int
    x: Rows


@dataclass(frozen=True, slots=True)
class _Batch:
    """Rows of one model that run together; `target` is none where they climb."""

    model: ServedModel
    items: tuple[_Item, ...]
    target: Target | None


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

    @property
    def ready(self) -> bool:
        """Warm, and its loop alive."""
        return self._warm and self._loop_task is not None and not self._loop_task.done()

    async def start(self, models: Sequence[ServedModel]) -> None:
        """Warm `models` up in the inference thread, then take requests."""
        loop = asyncio.get_running_loop()
        for model in models:
            await loop.run_in_executor(self._thread, model.warm_up, self.max_batch, self.clock)
        self._loop_task = asyncio.create_task(self._run_forever(), name="engine")
        self._warm = True

    async def stop(self) -> None:
        """Stop taking requests, refuse those that wait, let the running batch end."""
        self._warm = False
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        while self._queue:
            _fail(self._queue.popleft().ticket, NotReady("the server is shutting down"))
        self._thread.shutdown(wait=True)

    async def submit(self, model: ServedModel, x: Rows, wish: Wish, arrived_s: float) -> Answer:
        """Answer the rows of `x (rows, *input_shape) float32`, which arrived at `arrived_s` on the engine's clock.

        Raises:
            NotReady: the engine is warming up or shutting down.
            QueueFull: too many rows wait.
            DeadlineExpired: the budget ran out before any block had run.
            InferenceFailed: the runtime raised.
        """
        if not self.ready:
            raise NotReady("the server is warming up or shutting down: ask again in a second")
        waiting = len(self._queue)
        if waiting + len(x) > self.max_queue_rows:
            raise QueueFull(f"{waiting} rows wait already and at most {self.max_queue_rows} may, got {len(x)} more")
        ticket = _Ticket(model, wish, arrived_s, asyncio.get_running_loop().create_future(), [None] * len(x))
        self._queue.extend(_Item(ticket, index, row) for index, row in enumerate(x))
        self.metrics.requests.labels(model.name).inc()
        self.metrics.queue_rows.set(len(self._queue))
        self._arrived.set()
        return await ticket.done

    async def _run_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = self._next_batch()
            self.metrics.queue_rows.set(len(self._queue))
            if batch is None:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            self.metrics.batch_rows.labels(batch.model.name).observe(len(batch.items))
            try:
                answers, compute_s = await loop.run_in_executor(self._thread, self._run, batch)
            except asyncio.CancelledError:
                _fail_all(batch, NotReady("the server is shutting down"))
                raise
            except Exception:
                logger.exception("inference of %d rows of %s failed", len(batch.items), batch.model.name)
                _fail_all(
                    batch, InferenceFailed("the model could not be run on this input; the server's log has the cause")
                )
                continue
            self._deliver(batch, answers, compute_s)

    def _next_batch(self) -> _Batch | None:
        """The oldest waiting row and the others that can run with it. Leaves out who has gone or expired."""
        now = self.clock()
        size = min(len(self._queue), self.max_batch)
        head: tuple[ServedModel, Path | None] | None = None
        target: Target | None = None
        chosen: list[_Item] = []
        kept: deque[_Item] = deque()
        while self._queue and len(chosen) < self.max_batch:
            item = self._queue.popleft()
            ticket = item.ticket
            if ticket.done.done():
                continue
            if ticket.wish.deadline_s is not None and now >= ticket.wish.deadline_s and ticket.queue_s is None:
                _fail(ticket, DeadlineExpired("the latency budget ran out in the queue, before any block had run"))
                continue
            own = self._target(ticket, now, size)
            key = (ticket.model, own.path if own else None)
            if head is None:
                head, target = key, own
            if key == head:
                chosen.append(item)
            else:
                kept.append(item)
        kept.extend(self._queue)
        self._queue = kept
        if head is None:
            return None
        for ticket in {id(item.ticket): item.ticket for item in chosen}.values():
            if ticket.queue_s is None:
                ticket.queue_s = now - ticket.arrived_s
        return _Batch(head[0], tuple(chosen), target)

    def _target(self, ticket: _Ticket, now: float, rows: int) -> Target | None:
        wish = ticket.wish
        if wish.min_confidence is not None:
            return None
        slack_s = None if wish.deadline_s is None else wish.deadline_s - now - self.reserve_s
        return choose_target(ticket.model.manifest, wish, slack_s, rows, ticket.model.latency_s)

    def _run(self, batch: _Batch) -> tuple[list[RowAnswer], float]:
        """In the inference thread: the answers of a batch and its seconds."""
        start = self.clock()
        x = np.stack([item.x for item in batch.items])
        answers = self._climb(batch, x) if batch.target is None else self._run_path(batch, x, batch.target)
        return answers, self.clock() - start

    def _run_path(self, batch: _Batch, x: Rows, target: Target) -> list[RowAnswer]:
        output = batch.model.runner.run(target.path, x, embed=True)
        assert output.logits is not None
        # Rows that share a path may have come to it for different reasons: each keeps its own.
        return [
            self._answer(row, target.path, self._reason(item, target))
            for row, item in zip(_probabilities(batch.model, target.path, output.logits), batch.items, strict=True)
        ]

    @staticmethod
    def _reason(item: _Item, target: Target) -> StoppedBy:
        wish = item.ticket.wish
        if wish.path is not None:
            return wish.asked_as
        reference = item.ticket.model.manifest.reference
        return "complete" if target.path == reference else "budget"

    def _climb(self, batch: _Batch, x: Rows) -> list[RowAnswer]:
        """Rung by rung with those rows that are not confident enough yet and have time for more."""
        model, targets = batch.model, batch.model.climb
        answers: list[RowAnswer | None] = [None] * len(batch.items)
        active = np.arange(len(batch.items))
        source: Rows = x
        before: Path | None = None
        for position, target in enumerate(targets):
            segment = segment_between(before, target)
            following = targets[position + 1] if position + 1 < len(targets) else None
            upcoming = segment_between(target, following) if following is not None else None
            output = model.runner.run(
                segment.nodes,
                x[active] if segment.embed else source,
                embed=segment.embed,
                keep_state=upcoming is not None and not upcoming.embed,
            )
            assert output.logits is not None
            now = self.clock()
            next_s = model.latency_s(upcoming, len(active)) + self.reserve_s if upcoming is not None else 0.0
            going_on = []
            for offset, probabilities in enumerate(_probabilities(model, target, output.logits)):
                index = int(active[offset])
                wish = batch.items[index].ticket.wish
                assert wish.min_confidence is not None
                stopped: StoppedBy | None = None
                if probabilities.max() >= wish.min_confidence:
                    stopped = "confidence"
                elif upcoming is None:
                    stopped = "complete"
                elif wish.deadline_s is not None and now + next_s > wish.deadline_s:
                    stopped = "budget"
                if stopped is None:
                    going_on.append(offset)
                else:
                    answers[index] = self._answer(probabilities, target, stopped)
            if not going_on:
                break
            active = active[going_on]
            if output.state is not None:
                source = output.state[going_on]
            before = target
        assert all(answer is not None for answer in answers)
        return [answer for answer in answers if answer is not None]

    @staticmethod
    def _answer(probabilities: NDArray[np.float32], path: Path, stopped_by: StoppedBy) -> RowAnswer:
        label = int(probabilities.argmax())
        return RowAnswer(label, float(probabilities[label]), probabilities, path, stopped_by)

    def _deliver(self, batch: _Batch, answers: list[RowAnswer], compute_s: float) -> None:
        for item, answer in zip(batch.items, answers, strict=True):
            item.ticket.answers[item.index] = answer
            self.metrics.answers.labels(batch.model.name, len(answer.path), answer.stopped_by).inc()
        for ticket in {id(item.ticket): item.ticket for item in batch.items}.values():
            ticket.compute_s += compute_s
            rows = tuple(answer for answer in ticket.answers if answer is not None)
            if len(rows) == len(ticket.answers) and not ticket.done.done():
                self.metrics.queue_seconds.labels(batch.model.name).observe(ticket.queue_s or 0.0)
                self.metrics.compute_seconds.labels(batch.model.name).observe(ticket.compute_s)
                ticket.done.set_result(Answer(rows, ticket.queue_s or 0.0, ticket.compute_s))


def _probabilities(model: ServedModel, path: Path, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """`softmax(logits / temperature of the path)`, `(rows, classes) float32`."""
    scaled = logits / np.float32(model.manifest.offered[path].temperature)
    scaled -= scaled.max(axis=1, keepdims=True)
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(axis=1, keepdims=True)
    return scaled


def _fail_all(batch: _Batch, error: ServiceError) -> None:
    for item in batch.items:
        _fail(item.ticket, error)


def _fail(ticket: _Ticket, error: ServiceError) -> None:
    if not ticket.done.done():
        ticket.done.set_exception(error)
