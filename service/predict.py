"""The routes that answer: a body in, the engine, a body or a stream of events out."""

from __future__ import annotations

import time
from collections.abc import Coroutine
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json
from starlette.responses import StreamingResponse

from family.manifest import Manifest
from family.tree import format_path
from service.access import HttpArrival
from service.answers import Answer, OnAnswer, RowAnswer
from service.bodies import parse
from service.call import Call, open_call
from service.context import Context, Ctx, context_of, errors, milliseconds
from service.direct import DirectRoute
from service.errors import ClientGone, DeadlineExpired, InvalidInput, ServiceError
from service.inputs import Decoder
from service.media import JSON, OCTETS, RAW_BODY, reading
from service.policy.wish import Wish
from service.presence import while_connected
from service.runtime import Rows
from service.schemas import EVENT_SCHEMA, PredictRequest, PredictResponse, Risk, StreamAnswer, StreamEnd, StreamRequest
from service.streaming import EventStream, MostConfident, answer_events
from service.versions import for_models, model_urls, served_model
from service.wishes import HEADER_PARAMETERS, QUERY_PARAMETERS, refuse_query, with_headers

router = APIRouter(redirect_slashes=False, route_class=reading(JSON, OCTETS))  # direct routes take both first
stream_router = APIRouter(redirect_slashes=False, route_class=reading(JSON))


async def _prepare(body: PredictRequest, request: Request, ctx: Context, *, climb: bool) -> tuple[Call, Rows, float | None]:
    """Everything before the engine, and when a thread began to decode, if one did. With `climb` a request without a wish
    climbs to the end."""
    served = served_model(request)
    if (rows := len(body.inputs)) > (most := ctx.settings.max_request_rows):
        raise InvalidInput(f"inputs: expected at most {most} rows (max_request_rows), got {rows}")
    call = open_call(ctx, served, body, len(body.inputs), HttpArrival(request), climb=climb)
    decoder = Decoder(served.manifest, ctx.settings.max_image_pixels)
    if (x := decoder.decode_if_quick(body.inputs)) is not None:
        return call, x, None
    try:
        return call, *await ctx.decoding.run(partial(decoder.decode, body.inputs), call.arrived_s, call.budget_s)
    except DeadlineExpired as error:
        call.failed(error)
        raise


@for_models(
    router,
    "/v1",
    "POST",
    "/predict",
    tags=["predict"],
    response_model=PredictResponse,
    responses=errors(400, 404, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra={"parameters": [*QUERY_PARAMETERS, *HEADER_PARAMETERS], "requestBody": RAW_BODY},
)
async def predict(body: PredictRequest, request: Request, ctx: Ctx) -> Response:
    """Answer each input at the depth that its wishes and the budget allow."""
    refuse_query(request.scope["query_string"])
    body = with_headers(body, request.scope["headers"])
    call, x, begun_s = await _prepare(body, request, ctx, climb=False)
    try:
        return await answer_call(request, call, x, probabilities=body.probabilities)
    finally:
        budget_ms = request.scope["state"].get("budget_ms")  # see `HttpArrival`
        if begun_s is not None and budget_ms is not None:
            answer = request.scope["state"]["answer"]
            ctx.decoding.pace.ended(budget_ms / 1000, begun_s, answer, time.monotonic())


async def predict_json(request: Request) -> Response:
    """As `predict`, for a body that FastAPI has not read."""
    return await predict(parse(PredictRequest, await request.body()), request, context_of(request))


direct_routes = [DirectRoute(f"{url}/predict", predict_json, JSON) for url in model_urls("/v1")]
"""At the URLs of raw bodies."""


async def answer_call(request: Request, call: Call, x: Rows, *, probabilities: bool) -> Response:
    """The engine's answer to `x (rows, *input_shape) float32` as a `PredictResponse`."""
    with call:
        answer = await while_connected(request, call.ctx.engine.submit(call.served, x, call.wish, call.arrived_s))
    total_s = call.answered(answer)
    served = call.served
    # A plain dict, serialised here: validating our own answer, once or as FastAPI would twice, costs more than the rest.
    content = {
        "model": served.name,
        "version": served.version,
        "predictions": [_prediction(row, served.manifest.labels, probabilities, call.wish) for row in answer.rows],
        "deadline_met": call.deadline_met(total_s),
        "risk": _risk(served.manifest, call.wish.risk),
        "queue_ms": milliseconds(answer.queue_s),
        "compute_ms": milliseconds(answer.compute_s),
        "total_ms": milliseconds(total_s),
    }
    return Response(to_json(content), media_type="application/json")


@for_models(
    stream_router,
    "/v1",
    "POST",
    "/predict/stream",
    tags=["predict"],
    response_class=StreamingResponse,  # FastAPI's own kind wants a generator, which cannot choose the status
    responses={
        **errors(400, 404, 413, 415, 422, 429, 500, 503, 504),
        200: {
            "description": "Server-sent events: `answer` per row and rung (StreamAnswer), then `end` (StreamEnd), or "
            "`error` (Error) if something fails after the first answer",
            # Of OpenAPI 3.2, and what FastAPI writes for its own streams; 3.1 has no word for the parts of one.
            "content": {"text/event-stream": {"itemSchema": EVENT_SCHEMA}},
        },
    },
    openapi_extra={"parameters": HEADER_PARAMETERS},
)
async def predict_stream(body: StreamRequest, request: Request, ctx: Ctx) -> Response:
    """Stream the answer of every rung as soon as it is known. A client that leaves stops the work at the next one."""
    refuse_query(request.scope["query_string"])
    body = with_headers(body, request.scope["headers"])
    call, x, _ = await _prepare(body, request, ctx, climb=True)
    labels = call.served.manifest.labels
    best = MostConfident()

    def on_answer(row: int, answer: RowAnswer) -> StreamAnswer:
        shown = best(row, answer) if body.monotone else answer
        content = _prediction(shown, labels, body.probabilities, call.wish) | {"stopped_by": answer.stopped_by}
        return StreamAnswer(**content, row=row, final=answer.stopped_by is not None, total_ms=milliseconds(call.total_s))

    def on_end(answer: Answer) -> StreamEnd:
        total_s = call.answered(answer, streamed=True)
        return StreamEnd(
            model=call.served.name,
            version=call.served.version,
            deadline_met=call.deadline_met(total_s),
            risk=Risk(**risk) if (risk := _risk(call.served.manifest, body.max_risk)) is not None else None,
            queue_ms=milliseconds(answer.queue_s),
            compute_ms=milliseconds(answer.compute_s),
            total_ms=milliseconds(total_s),
        )

    def work(listener: OnAnswer) -> Coroutine[None, None, Answer]:
        return ctx.engine.submit(call.served, x, call.wish, call.arrived_s, listener)

    def on_error(error: ServiceError) -> None:
        call.failed(error, untold=True)

    events = answer_events(work, on_answer, on_end, on_error)
    with call:
        first = await while_connected(request, anext(events))
    return EventStream(first, events, on_gone=lambda: on_error(ClientGone("")))


def _risk(manifest: Manifest, max_risk: float | None) -> dict[str, float] | None:
    """A `Risk`."""
    if max_risk is None or manifest.certificate is None:
        return None
    return {"epsilon": max_risk, "delta": manifest.certificate.delta}


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
