"""A request on its way to the engine, whatever protocol it came by: its wish resolved, and all that belongs to its end."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from service.answers import Answer
from service.context import Context
from service.errors import ClientGone, DeadlineExpired, ServiceError
from service.logs import request_id
from service.policy.wish import Wish, resolve_wish
from service.repository import ServedModel
from service.schemas import Wishes
from service.tracing import Timed


class Arrival(Protocol):
    """How a request came, and who hears of its end there."""

    @property
    def arrived_s(self) -> float:
        """When, on the monotonic clock."""
        ...

    @property
    def leaving(self) -> tuple[type[BaseException], ...]:
        """What its client's leaving shows as, beside our own `ClientGone`."""
        ...

    def note(self, answer: Answer, deadline_met: bool | None, budget_ms: float | None) -> None:
        """Let the access log know how the engine answered, and to what budget, if that says how long an answer takes."""
        ...

    def note_expired(self, budget_ms: float) -> None:
        """There is no answer within this budget: that says so, too."""
        ...

    def span(self, error: ServiceError | None) -> tuple[str, dict[str, str | int], str | None]:
        """What traces tell of a request that ends well, or by `error`: a name, attributes, its own `traceparent`."""
        ...


@dataclass(frozen=True, slots=True)
class Call:
    """A request for `served`, understood and admitted. It ends once: as `answered`, or `failed`.

    The engine is asked within `with call:`, by which it has failed if an error of ours comes out, or its client leaves.
    """

    ctx: Context
    served: ServedModel
    wish: Wish
    arrival: Arrival
    budget_ms: float | None

    @property
    def arrived_s(self) -> float:
        """See `Arrival`."""
        return self.arrival.arrived_s

    @property
    def budget_s(self) -> float | None:
        """The budget, if it has one."""
        return None if self.budget_ms is None else self.budget_ms / 1000

    @property
    def total_s(self) -> float:
        """Seconds since it arrived."""
        return time.monotonic() - self.arrived_s

    def deadline_met(self, total_s: float) -> bool | None:
        """Whether an answer after `total_s` keeps the budget; none without one."""
        return None if self.budget_ms is None else total_s * 1000 <= self.budget_ms

    def certified(self, answer: Answer) -> bool | None:
        """Whether the certificate covers all rows of `answer`; none if it was not asked for a certified risk."""
        if self.wish.asked_as != "risk":
            return None
        return all(row.stopped_by in ("risk", "complete") for row in answer.rows)

    def answered(self, answer: Answer, *, streamed: bool = False) -> float:
        """Count, note and trace that it ends by `answer`, after as many seconds as this returns.

        The model learns how long it took from the decision until now, when the response is built. Not where answers are
        `streamed`: there a slow reader would tell.
        """
        metrics, labels, total_s = self.ctx.metrics, self.served.labels, self.total_s
        deadline_met = self.deadline_met(total_s)
        metrics.of(metrics.total_seconds, *labels).observe(total_s)
        metrics.of(metrics.last_answer, *labels).set_to_current_time()
        if deadline_met is not None:
            metrics.of(metrics.deadlines, *labels, str(deadline_met).lower()).inc()
        if self.served.profile is not None and not streamed:
            self.served.profile.observe_send(time.monotonic() - answer.decided_s)
        self.arrival.note(answer, deadline_met, None if streamed else self.budget_ms)
        self._trace(answer.spans, None)
        return total_s

    def failed(self, error: ServiceError, *, untold: bool = False) -> None:
        """Count and trace that it ends by `error`. Whoever tells a client of an error counts it as a refusal; if it is
        `untold`, nobody does, and so it is here."""
        self.ctx.metrics.failed_seconds.labels(*self.served.labels).observe(self.total_s)
        if isinstance(error, DeadlineExpired) and self.budget_ms is not None:
            self.arrival.note_expired(self.budget_ms)
        if untold:
            self.ctx.metrics.refusals.labels(error.code).inc()
        self._trace((), error)

    def __enter__(self) -> None:  # no generator of contextlib's: every request comes here
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, ServiceError):
            self.failed(error)
        elif isinstance(error, self.arrival.leaving):
            self.failed(ClientGone(""), untold=True)

    def _trace(self, spans: Sequence[Timed], error: ServiceError | None) -> None:
        """Export the spans, if anybody wants them."""
        if self.ctx.tracer is None:
            return
        name, attributes, traceparent = self.arrival.span(error)
        attributes |= {
            "hbll.model": self.served.name,
            "hbll.request_id": request_id.get() or "",
            "hbll.version": self.served.version,
        }
        self.ctx.tracer.export(Timed(name, self.arrived_s, time.monotonic(), attributes), spans, traceparent)


def open_call(
    ctx: Context,
    served: ServedModel,
    wishes: Wishes,
    rows: int,
    arrival: Arrival,
    *,
    climb: bool = False,
    priority: int = 0,
    at_most_ms: float | None = None,
) -> Call:
    """Everything that can be refused before the `rows` are decoded. With `climb` a request without a wish climbs to
    the end. No budget is longer than `at_most_ms`, for which its client waits.

    Raises:
        InvalidInput: the path is none of the tree's.
        NotOffered: the model does not offer what is wished for.
        NotReady: the engine is warming up or shutting down.
        QueueFull: too many rows wait.
    """
    budget_ms = wishes.latency_budget_ms
    if budget_ms is None and not wishes.wishes:
        budget_ms = served.settings.default_latency_budget_ms
    if at_most_ms is not None:
        budget_ms = at_most_ms if budget_ms is None else min(budget_ms, at_most_ms)
    wish = resolve_wish(
        served.manifest,
        depth=wishes.depth,
        path=wishes.path,
        min_confidence=wishes.min_confidence if wishes.wishes or not climb else math.inf,
        max_risk=wishes.max_risk,
        deadline_s=None if budget_ms is None else arrival.arrived_s + budget_ms / 1000,
        strict=wishes.strict,
        priority=priority,
        min_depth=served.settings.min_depth,
    )
    ctx.engine.require_room(rows)
    return Call(ctx, served, wish, arrival, budget_ms)
