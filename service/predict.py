"""The routes that answer: a body in, the engine, a body or a stream of events out."""

from __future__ import annotations

import math
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from family.manifest import Manifest
from family.tree import format_path
from service.answers import Answer, OnAnswer, RowAnswer
from service.context import Context, Ctx, errors, milliseconds
from service.errors import ClientGone, InvalidInput, ServiceError
from service.inputs import Decoder, takes_long
from service.policy import Wish, resolve_wish
from service.presence import while_connected
from service.repository import ServedModel
from service.runtime import Rows
from service.schemas import Prediction, PredictRequest, PredictResponse, Risk, StreamAnswer, StreamEnd, StreamRequest
from service.streaming import EventStream, MostConfident, answer_events

router = APIRouter(redirect_slashes=False)


@dataclass(frozen=True, slots=True)
class _Call:
    """A predict request, checked and decoded, on its way to the engine."""

    served: ServedModel
    x: Rows
    wish: Wish
    arrived_s: float
    budget_ms: float | None

    @property
    def total_s(self) -> float:
        return time.monotonic() - self.arrived_s

    def deadline_met(self, total_s: float) -> bool | None:
        return None if self.budget_ms is None else total_s * 1000 <= self.budget_ms


async def _prepare(model: str, body: PredictRequest, request: Request, ctx: Context, *, climb: bool) -> _Call:
    """Everything before the engine. With `climb` a request without a wish climbs to the end."""
    served = ctx.repository.get(model)
    if len(body.inputs) > ctx.settings.max_request_rows:
        raise InvalidInput(f"inputs: expected at most {ctx.settings.max_request_rows} rows, got {len(body.inputs)}")
    arrived_s: float = request.state.arrived_s
    budget_ms = body.latency_budget_ms if body.latency_budget_ms or body.wishes else ctx.settings.default_latency_budget_ms
    wish = resolve_wish(
        served.manifest,
        depth=body.depth,
        path=body.path,
        min_confidence=body.min_confidence if body.wishes or not climb else math.inf,
        max_risk=body.max_risk,
        deadline_s=None if budget_ms is None else arrived_s + budget_ms / 1000,
        strict=body.strict,
    )
    ctx.engine.require_room(len(body.inputs))
    decode = Decoder(served.manifest, ctx.settings.max_image_pixels).decode
    x = await run_in_threadpool(decode, body.inputs) if takes_long(body.inputs) else decode(body.inputs)
    return _Call(served, x, wish, arrived_s, budget_ms)


def _count(ctx: Context, call: _Call, total_s: float) -> None:
    name = call.served.name
    ctx.metrics.total_seconds.labels(name).observe(total_s)
    met = call.deadline_met(total_s)
    if met is not None:
        ctx.metrics.deadlines.labels(name, str(met).lower()).inc()


@router.post(
    "/v1/models/{model}/predict",
    tags=["predict"],
    response_model=PredictResponse,
    responses=errors(400, 404, 413, 415, 422, 429, 500, 503, 504),
)
async def predict(model: str, body: PredictRequest, request: Request, ctx: Ctx) -> Response:
    """Answer each input at the depth that its wishes and the budget allow."""
    call = await _prepare(model, body, request, ctx, climb=False)
    answer = await while_connected(request, ctx.engine.submit(call.served, call.x, call.wish, call.arrived_s))

    labels = call.served.manifest.labels
    predictions = [Prediction(**_prediction(row, labels, body.probabilities, call.wish)) for row in answer.rows]
    total_s = call.total_s
    _count(ctx, call, total_s)
    response = PredictResponse(
        model=model,
        version=call.served.version,
        predictions=predictions,
        deadline_met=call.deadline_met(total_s),
        risk=_risk(call.served.manifest, body.max_risk),
        queue_ms=milliseconds(answer.queue_s),
        compute_ms=milliseconds(answer.compute_s),
        total_ms=milliseconds(total_s),
    )
    # Serialised here: as a returned model FastAPI would validate it a second time.
    return Response(response.model_dump_json(), media_type="application/json")


@router.post(
    "/v1/models/{model}/predict/stream",
    tags=["predict"],
    response_class=StreamingResponse,  # FastAPI's own kind wants a generator, which cannot choose the status
    responses={
        **errors(400, 404, 413, 415, 422, 429, 500, 503, 504),
        200: {
            "description": "Server-sent events: `answer` per row and rung (StreamAnswer), then `end` (StreamEnd), or "
            "`error` (Error) if something fails after the first answer",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
    },
)
async def predict_stream(model: str, body: StreamRequest, request: Request, ctx: Ctx) -> Response:
    """Stream the answer of every rung as soon as it is known. A client that leaves stops the work at the next one."""
    call = await _prepare(model, body, request, ctx, climb=True)
    labels = call.served.manifest.labels
    best = MostConfident()

    def on_answer(row: int, answer: RowAnswer) -> StreamAnswer:
        shown = best(row, answer) if body.monotone else answer
        content = _prediction(shown, labels, body.probabilities, call.wish) | {"stopped_by": answer.stopped_by}
        return StreamAnswer(**content, row=row, final=answer.stopped_by is not None, total_ms=milliseconds(call.total_s))

    def on_end(answer: Answer) -> StreamEnd:
        total_s = call.total_s
        _count(ctx, call, total_s)
        return StreamEnd(
            model=model,
            version=call.served.version,
            deadline_met=call.deadline_met(total_s),
            risk=_risk(call.served.manifest, body.max_risk),
            queue_ms=milliseconds(answer.queue_s),
            compute_ms=milliseconds(answer.compute_s),
            total_ms=milliseconds(total_s),
        )

    def work(listener: OnAnswer) -> Coroutine[None, None, Answer]:
        return ctx.engine.submit(call.served, call.x, call.wish, call.arrived_s, listener)

    def on_error(error: ServiceError) -> None:
        ctx.metrics.refusals.labels(error.code).inc()

    events = answer_events(work, on_answer, on_end, on_error)
    first = await while_connected(request, anext(events))
    return EventStream(first, events, on_gone=lambda: on_error(ClientGone("")))


def _risk(manifest: Manifest, max_risk: float | None) -> Risk | None:
    if max_risk is None or manifest.certificate is None:
        return None
    return Risk(epsilon=max_risk, delta=manifest.certificate.delta)


def _prediction(row: RowAnswer, labels: tuple[str, ...], probabilities: bool, wish: Wish) -> dict[str, Any]:
    """The members of a `Prediction`."""
    return {
        "label": labels[row.label],
        "confidence": row.confidence,
        "depth": len(row.path),
        "path": format_path(row.path),
        "stopped_by": row.stopped_by,
        "certified": row.stopped_by in ("risk", "complete") if wish.asked_as == "risk" else None,
        "probabilities": dict(zip(labels, map(float, row.probabilities), strict=True)) if probabilities else None,
    }
