"""A request on its way to the engine, whatever protocol it came by: its wish resolved, its time and outcome counted."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request

from service.answers import Answer
from service.context import Context
from service.logs import request_id
from service.metrics import Metrics
from service.policy.wish import Wish, resolve_wish
from service.repository import ServedModel
from service.schemas import Wishes
from service.tracing import Timed


@dataclass(frozen=True, slots=True)
class Call:
    """A request for `served`, understood and admitted. `arrived_s` is on the monotonic clock."""

    served: ServedModel
    wish: Wish
    arrived_s: float
    budget_ms: float | None

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


def open_call(
    ctx: Context,
    served: ServedModel,
    wishes: Wishes,
    rows: int,
    arrived_s: float,
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
        deadline_s=None if budget_ms is None else arrived_s + budget_ms / 1000,
        strict=wishes.strict,
        priority=priority,
        min_depth=served.settings.min_depth,
    )
    ctx.engine.require_room(rows)
    return Call(served, wish, arrived_s, budget_ms)


def count_answered(metrics: Metrics, call: Call, total_s: float) -> None:
    """Count a call that was answered after `total_s`."""
    labels = call.served.labels
    metrics.of(metrics.total_seconds, *labels).observe(total_s)
    metrics.of(metrics.last_answer, *labels).set_to_current_time()
    met = call.deadline_met(total_s)
    if met is not None:
        metrics.of(metrics.deadlines, *labels, str(met).lower()).inc()


def learn_send(call: Call, answer: Answer) -> None:
    """Let the model know how long it took from the decision until now, when the response is built. Not of streams: there
    a slow reader would tell."""
    if call.served.profile is not None:
        call.served.profile.observe_send(time.monotonic() - answer.decided_s)


def count_failed(metrics: Metrics, call: Call) -> None:
    """Count a call that was admitted and ended in an error."""
    metrics.failed_seconds.labels(*call.served.labels).observe(call.total_s)


def trace(ctx: Context, request: Request, call: Call, spans: Sequence[Timed], status: int) -> None:
    """Export the spans of a request that ends now, if anybody wants them."""
    if ctx.tracer is None:
        return
    route = request.scope["route"].path
    attributes = {
        "http.request.method": request.method,
        "http.route": route,
        "http.response.status_code": status,
        "hbll.model": call.served.name,
        "hbll.request_id": request.state.request_id,
        "hbll.version": call.served.version,
    }
    whole = Timed(f"{request.method} {route}", call.arrived_s, call.arrived_s + call.total_s, attributes)
    ctx.tracer.export(whole, spans, request.headers.get("traceparent"))


def trace_rpc(
    ctx: Context, method: str, traceparent: str | None, call: Call, spans: Sequence[Timed], status_code: int
) -> None:
    """`trace` for a call of the gRPC `method`, `package.Service/Method`, which ends with that status."""
    if ctx.tracer is None:
        return
    service, _, name = method.partition("/")
    attributes: dict[str, str | int] = {
        "rpc.system": "grpc",
        "rpc.service": service,
        "rpc.method": name,
        "rpc.grpc.status_code": status_code,
        "hbll.model": call.served.name,
        "hbll.request_id": request_id.get() or "",
        "hbll.version": call.served.version,
    }
    whole = Timed(method, call.arrived_s, call.arrived_s + call.total_s, attributes)
    ctx.tracer.export(whole, spans, traceparent)
