"""What runs next, the run itself, and what it brought: the policies, and the device that they share.

All but `infer` happens on the event loop, between two runs. So the loop has read what came meanwhile when the next batch is
chosen, which makes batches larger just when there is most to do; and nobody else touches a policy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from family.tree import Path, format_path
from service.answers import RowAnswer
from service.policy.scheduler import Scheduler
from service.policy.state import Batch, Decision, Policy, Step
from service.policy.wish import Wish
from service.repository import ServedModel
from service.runtime import Output, Rows
from service.tickets import TicketRow
from service.tracing import Timed

_HUNG_RATIO = 100
"""A run that takes so many times what it was expected to is no slow one."""


_MOST_GUESSES = 8
"""Of the smallest budget that can be met: each passes all rows that were due by the one before."""


@dataclass(slots=True, eq=False)
class Run:
    """A batch that has the device, since it was decided at `start_s` on the engine's clock. After `hung_after_s`, at
    `hung_at_s` of `time.monotonic`, it is taken for hung."""

    model: ServedModel
    batch: Batch
    start_s: float
    hung_after_s: float
    hung_at_s: float

    @property
    def rows(self) -> Sequence[TicketRow]:
        """Those of the batch."""
        return cast(Sequence[TicketRow], self.batch.rows)

    @property
    def expected_end_s(self) -> float:
        """On the engine's clock."""
        return self.start_s + self.batch.expected_s


@dataclass(slots=True)
class Ended:
    """A run ended, `took_s` after it was decided. Clients may want to hear of the answers of some rows that go on
    (`told`), and some are no numbers (`overflowed`)."""

    took_s: float
    told: list[TicketRow] = field(default_factory=list)
    overflowed: list[TicketRow] = field(default_factory=list)


@dataclass(slots=True)
class Turn:
    """What was decided, at `decided_s`, which took `thought_s`, and the run that begins, if any."""

    decisions: Sequence[Decision]
    decided_s: float
    thought_s: float = 0.0
    run: Run | None = None


class Dispatch:
    """See the module.

    Attributes:
        running: what has the device.

    Args:
        clock: the engine's.
        hung_s: the least time after which a run is taken for hung.
    """

    def __init__(self, clock: Callable[[], float], hung_s: float) -> None:
        self._clock = clock
        self._hung_s = hung_s
        self._scheduler: Scheduler[ServedModel] = Scheduler()
        self.running: Run | None = None

    @property
    def models(self) -> list[ServedModel]:
        """Those that have a policy."""
        return list(self._scheduler.policies)

    def serve(self, model: ServedModel, policy: Policy) -> None:
        """Let this policy decide for a model from now on, knowing of none of its rows."""
        self._scheduler.policies[model] = policy

    def forget(self, model: ServedModel) -> bool:
        """Forget a model, unless some of its rows wait or run. Returns whether it did."""
        busy = self.running is not None and self.running.model is model
        if busy or self._scheduler.policies[model].waiting():
            return False
        del self._scheduler.policies[model]
        return True

    def waiting(self) -> int:
        """How many rows wait, of all models."""
        return self._scheduler.waiting()

    def wake_s(self) -> float:
        """When to decide again even though nothing happens; infinity for never."""
        return self._scheduler.wake_s()

    def arrive(self, row: TicketRow, now_s: float) -> None:
        """A row joins those that wait."""
        self._scheduler.policies[row.model].arrive(row, now_s)

    def leave(self, row: TicketRow) -> None:
        """A row is of no more interest."""
        policy = self._scheduler.policies.get(row.model)
        if policy is not None:  # forgotten, after its answer and before its client's departure was known
            policy.leave(row)

    def foresee(self, model: ServedModel, wish: Wish, rows: int) -> tuple[Step, ...]:
        """The answers that such a request could expect if it came now, on the engine's clock."""
        free_s = self.running.expected_end_s if self.running is not None else -math.inf
        return self._scheduler.policies[model].foresee(wish, rows, max(self._clock(), free_s))

    def feasible_s(self, model: ServedModel, wish: Wish, rows: int) -> float:
        """The earliest deadline that could be met, or that of `wish` if it can. A later deadline lets more rows go first,
        so what is expected by one is asked for as the next, until that is met."""
        by_s = -math.inf
        for _ in range(_MOST_GUESSES):
            by_s = self.foresee(model, wish, rows)[0].by_s
            if wish.deadline_s is not None and by_s <= wish.deadline_s:
                return wish.deadline_s
            wish = replace(wish, deadline_s=by_s)
        return by_s

    def learn_of_refusal(self, model: ServedModel) -> None:
        """An idle server that refuses must not go on doing so because of how slow it once was."""
        idle = self.running is None or self._clock() >= self.running.expected_end_s
        if model.profile is not None and idle and not self.waiting():
            model.profile.relax()

    def decide(self, *, crowded: bool) -> Turn:
        """What to do now that the device is free. `crowded`: see `Policy.decide`."""
        now = self._clock()
        decisions, model, batch = self._scheduler.decide(now, crowded=crowded)
        turn = Turn(decisions, now, self._clock() - now)
        if batch is not None and model is not None:
            hung_after_s = max(self._hung_s, _HUNG_RATIO * batch.expected_s)
            turn.run = Run(model, batch, now, hung_after_s, time.monotonic() + hung_after_s)
        self.running = turn.run
        return turn

    def settle(self) -> Turn:
        """Nothing will run any more: what has an answer gets it."""
        now = self._clock()
        return Turn([policy.settle(now, math.inf) for policy in self._scheduler.policies.values()], now)

    def infer(self, run: Run) -> tuple[Output, float]:
        """What the model says of a batch, and the seconds that it took to. May be called in another thread."""
        begun_s = self._clock()
        batch, segment = run.batch, run.batch.segment
        source = np.stack([row.x if segment.embed else cast(Rows, row.state) for row in run.rows])
        output = run.model.runner.run(
            segment.nodes, source, embed=segment.embed, predict=batch.predict, keep_state=batch.keep_state
        )
        return output, self._clock() - begun_s

    def failed(self) -> None:
        """What runs brought nothing."""
        self.running = None

    def finish(self, run: Run, output: Output, ran_s: float) -> Ended:
        """Note the answers that a run has brought, tell the policy, and let the profile learn."""
        now = self._clock()
        self.running = None
        model, batch, rows, ended = run.model, run.batch, run.rows, Ended(now - run.start_s)
        assert model.profile is not None
        model.profile.observe(batch.segment, len(rows), ran_s, max(0.0, ended.took_s - ran_s))
        policy = self._scheduler.policies[model]
        ends = [len(row.at) * (not batch.segment.embed) + len(batch.segment.nodes) == len(row.target) for row in rows]
        confidences = [0.0] * len(rows)
        if output.logits is not None:
            paths = [row.target if end else model.manifest.reference for row, end in zip(rows, ends, strict=True)]
            probabilities = _probabilities(model, paths, output.logits)
            labels = probabilities.argmax(axis=1).tolist()
            confidences = probabilities.max(axis=1).tolist()
            for place, confidence in enumerate(confidences):
                if not math.isfinite(confidence):
                    confidences[place] = 0.0
                    policy.leave(rows[place])
                    ended.overflowed.append(rows[place])
        for place, row in enumerate(rows):
            row.state = None if output.state is None else output.state[place]
            if ends[place]:
                assert output.logits is not None
                if row.latest is None and row.ticket is not None:
                    row.ticket.answered_s = now
                row.latest = RowAnswer(
                    labels[place], confidences[place], probabilities[place], row.target, None, output.logits[place]
                )
                if row.ticket is not None and row.ticket.on_answer is not None:
                    ended.told.append(row)
        for ticket in {id(row.ticket): row.ticket for row in rows if row.ticket is not None}.values():
            if ticket.queue_s is None:
                ticket.queue_s = run.start_s - ticket.arrived_s
            ticket.compute_s += ended.took_s
            if ticket.spans is not None:
                attributes: dict[str, str | int] = {"hbll.nodes": format_path(batch.segment.nodes), "hbll.rows": len(rows)}
                ticket.spans.append(Timed("segment", run.start_s, now, attributes))
        policy.finished(batch, confidences, now)
        return ended


def _probabilities(model: ServedModel, paths: Sequence[Path], logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """`softmax(logits / temperature of each row's path)`, `(rows, classes) float32`."""
    offered = model.manifest.offered
    temperatures = np.array([offered[path].temperature for path in paths], np.float32)[:, None]
    scaled: NDArray[np.float32] = (logits / temperatures).astype(np.float32, copy=False)
    scaled -= scaled.max(axis=1, keepdims=True)
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(axis=1, keepdims=True)
    return scaled
