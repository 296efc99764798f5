"""What would be picked for a request now, and why; and the audits of certified answers: the routes for who watches."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request

from family.tree import format_path
from service.access import HttpArrival
from service.call import Call, open_call
from service.context import Context, Ctx, errors, milliseconds
from service.drift import DriftWatch
from service.errors import InvalidInput, NotReady
from service.keys import require_operator
from service.media import JSON, reading
from service.policy.state import Step
from service.repository import ServedModel
from service.schemas import AuditedLevel, Audits, Plan, PlannedAnswer, PlanQuery
from service.versions import Served, for_models

router = APIRouter(redirect_slashes=False, route_class=reading(JSON, unnamed=True))


@for_models(router, "/v1", "GET", "/plan", tags=["models"], responses=errors(404, 422, 429, 500, 503))
async def plan(served: Served, wishes: Annotated[PlanQuery, Query()], request: Request, ctx: Ctx) -> Plan:
    """What a request with these wishes would get now, by the live profile and what waits, and why."""
    if wishes.rows > ctx.settings.max_request_rows:
        raise InvalidInput(f"rows: expected at most {ctx.settings.max_request_rows}, got {wishes.rows}")
    call = open_call(ctx, served, wishes.as_wishes(), wishes.rows, HttpArrival(request))
    now_s = time.monotonic()
    steps = ctx.engine.foresee(served, call.wish, wishes.rows)
    accuracies = served.accuracies
    answers = [
        PlannedAnswer(
            path=format_path(step.path),
            depth=len(step.path),
            accuracy=accuracies[step.path],
            expected_ms=milliseconds(step.by_s - now_s),
        )
        for step in steps
    ]
    feasible = call.budget_ms is None or steps[0].by_s <= call.arrived_s + call.budget_ms / 1000
    return Plan(
        model=served.name,
        version=served.version,
        policy=served.settings.policy,
        path=answers[-1].path,
        depth=answers[-1].depth,
        expected_ms=answers[-1].expected_ms,
        feasible=feasible,
        reason=_reason(call, steps, feasible),
        answers=answers,
    )


def _reason(call: Call, steps: tuple[Step, ...], feasible: bool) -> str:
    wish, climb = call.wish, call.served.climb
    if not feasible:
        return "not even the first answer is expected within the budget" + (
            ": the request would be refused" if wish.strict else ": it would come late, or the request expire in the queue"
        )
    if wish.path is not None:
        return "the path that was asked for"
    until = ", unless an answer before it is confident enough" if wish.exit_at is not None else ""
    if steps[-1].path == climb[-1]:
        return "the reference path: nothing deeper is better" + until
    if call.budget_ms is not None and len(steps) < len(climb):
        return "the next answer is not expected within the budget, or not worth the time under the present load" + until
    return "what the policy chooses under the present load" + until


@for_models(router, "/v1", "GET", "/audits", tags=["models"], responses=errors(404, 500, 503))
async def audits(served: Served, ctx: Ctx) -> Audits:
    """What audits found: a random share of requests with max_risk is compared with the reference path."""
    return _audits(served, _drift(ctx, served))


@for_models(
    router,
    "/v1",
    "POST",
    "/audits/reset",
    tags=["models"],
    responses=errors(403, 404, 415, 500, 503),
    dependencies=[Depends(require_operator)],
)
async def reset_audits(served: Served, ctx: Ctx) -> Audits:
    """Trust the certificate again: forget all audits, and let levels exit early whose alarm was raised."""
    drift = _drift(ctx, served)
    drift.reset()
    return _audits(served, drift)


def _drift(ctx: Context, served: ServedModel) -> DriftWatch:
    drift = ctx.engine.drift(served)
    if drift is None:
        raise NotReady("the model is warming up: ask again in a second")
    return drift


def _audits(served: ServedModel, drift: DriftWatch) -> Audits:
    levels = [
        AuditedLevel(
            epsilon=epsilon,
            audits=alarm.audits,
            disagreements=alarm.disagreements,
            evidence=min(alarm.evidence, 1e300),
            alarm=alarm.raised,
        )
        for epsilon, alarm in drift.alarms.items()
    ]
    return Audits(model=served.name, version=served.version, audit_rate=served.settings.audit_rate, levels=levels)
