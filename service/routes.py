"""The HTTP routes: bodies in, engine, bodies out. They know neither queue nor runtime."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, PlainTextResponse

from family.manifest import Manifest
from family.tree import format_path
from service.engine import Answer, RowAnswer
from service.errors import InvalidInput
from service.inputs import Decoder, takes_long
from service.metrics import Metrics
from service.policy import Wish, resolve_wish
from service.profile import Segment
from service.repository import Repository, ServedModel
from service.runtime import Rows
from service.schemas import (
    Error,
    Live,
    ModelDetail,
    ModelList,
    ModelSummary,
    PathSummary,
    Prediction,
    PredictRequest,
    PredictResponse,
    Ready,
    Risk,
)
from service.settings import Settings


class Engine(Protocol):
    """What the routes need of an engine."""

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        ...

    async def start(self, models: Sequence[ServedModel]) -> None:
        """Warm up the models, then take requests."""
        ...

    async def stop(self) -> None:
        """Take no more requests and end."""
        ...

    def require_room(self, rows: int) -> None:
        """Raise what `submit` would raise for that many rows now."""
        ...

    async def submit(self, model: ServedModel, x: Rows, wish: Wish, arrived_s: float) -> Answer:
        """See `service.engine.Engine.submit`."""
        ...


class Context:
    """What the app hands to its routes."""

    def __init__(self, settings: Settings, repository: Repository, engine: Engine, metrics: Metrics) -> None:
        self.settings = settings
        self.repository = repository
        self.engine = engine
        self.metrics = metrics
        self.warm = False

    @property
    def ready(self) -> bool:
        """Every model is loaded and warm, and the engine lives."""
        return self.warm and self.engine.ready


def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


Ctx = Annotated[Context, Depends(_context)]


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    meanings = {
        400: "The body, a base64 string or an image cannot be parsed",
        404: "No such model",
        413: "The body is too long",
        415: "A content type or encoding that is not read",
        422: "Well-formed and not valid: a shape, a range, a depth or path that is not offered",
        429: "Too many rows wait already; Retry-After says when to ask again",
        500: "The server met an error of its own",
        503: "Warming up or shutting down; Retry-After says when to ask again",
        504: "The budget ran out before any block had run",
    }
    return {status: {"model": Error, "description": meanings[status]} for status in statuses}


router = APIRouter(redirect_slashes=False)


@router.post(
    "/v1/models/{model}/predict",
    tags=["predict"],
    response_model=PredictResponse,
    responses=_errors(400, 404, 413, 415, 422, 429, 500, 503, 504),
)
async def predict(model: str, body: PredictRequest, request: Request, ctx: Ctx) -> Response:
    """Answer each input at the depth that its wishes and the budget allow."""
    arrived_s: float = request.state.arrived_s
    served = ctx.repository.get(model)
    if len(body.inputs) > ctx.settings.max_request_rows:
        raise InvalidInput(f"inputs: expected at most {ctx.settings.max_request_rows} rows, got {len(body.inputs)}")
    budget_ms = body.latency_budget_ms if body.latency_budget_ms or body.wishes else ctx.settings.default_latency_budget_ms
    wish = resolve_wish(
        served.manifest,
        depth=body.depth,
        path=body.path,
        min_confidence=body.min_confidence,
        max_risk=body.max_risk,
        deadline_s=None if budget_ms is None else arrived_s + budget_ms / 1000,
    )
    ctx.engine.require_room(len(body.inputs))
    decode = Decoder(served.manifest, ctx.settings.max_image_pixels).decode
    x = await run_in_threadpool(decode, body.inputs) if takes_long(body.inputs) else decode(body.inputs)
    answer = await ctx.engine.submit(served, x, wish, arrived_s)

    labels = served.manifest.labels
    predictions = [_prediction(row, labels, body.probabilities, wish) for row in answer.rows]
    total_s = time.monotonic() - arrived_s
    deadline_met = None if budget_ms is None else total_s * 1000 <= budget_ms
    ctx.metrics.total_seconds.labels(model).observe(total_s)
    if deadline_met is not None:
        ctx.metrics.deadlines.labels(model, str(deadline_met).lower()).inc()
    response = PredictResponse(
        model=model,
        version=served.version,
        predictions=predictions,
        deadline_met=deadline_met,
        risk=_risk(served.manifest, body.max_risk),
        queue_ms=_ms(answer.queue_s),
        compute_ms=_ms(answer.compute_s),
        total_ms=_ms(total_s),
    )
    # Serialised here: as a returned model FastAPI would validate it a second time.
    return Response(response.model_dump_json(), media_type="application/json")


@router.get("/v1/models", tags=["models"], responses=_errors(500))
async def list_models(ctx: Ctx) -> ModelList:
    """The served models."""
    return ModelList(models=[_summary(served) for served in ctx.repository.models.values()])


@router.get("/v1/models/{model}", tags=["models"], responses=_errors(404, 422, 500))
async def describe_model(model: str, ctx: Ctx) -> ModelDetail:
    """What a model offers: every path with its accuracy and its latency here."""
    served = ctx.repository.get(model)
    manifest = served.manifest
    best, front = set(manifest.best_by_depth.values()), set(manifest.front)
    paths = [
        PathSummary(
            path=entry.path,
            depth=len(path),
            accuracy=entry.validation.accuracy,
            test_accuracy=entry.test.accuracy,
            agreement=entry.validation.agreement,
            latency_ms=_ms(served.latency_s(Segment(path, embed=True), 1)) if served.profile else None,
            flops=entry.flops,
            parameters=entry.parameters,
            pareto=path in front,
            best_of_depth=path in best,
        )
        for path, entry in manifest.offered.items()
    ]
    return ModelDetail(
        **_summary(served).model_dump(),
        hierarchy_depth=manifest.hierarchy_depth,
        input_shape=list(manifest.input.shape[1:]),
        labels=list(manifest.labels),
        reference=format_path(manifest.reference),
        climb=[format_path(path) for path in manifest.climb],
        risk_levels=[level.epsilon for level in manifest.certificate.levels] if manifest.certificate else [],
        paths=paths,
    )


@router.get("/health/live", tags=["health"])
async def live() -> Live:
    """The process answers."""
    return Live(live=True)


@router.get(
    "/health/ready", tags=["health"], response_model=Ready, responses={503: {"model": Ready, "description": "Not ready"}}
)
async def ready(ctx: Ctx) -> Response:
    """200 once every model is loaded and warm, 503 until then and while shutting down."""
    is_ready = ctx.ready
    return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)


@router.get("/metrics", tags=["health"], response_class=PlainTextResponse)
async def metrics(ctx: Ctx) -> Response:
    """Prometheus exposition."""
    ctx.metrics.ready.set(ctx.ready)
    return Response(ctx.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _summary(served: ServedModel) -> ModelSummary:
    return ModelSummary(name=served.name, version=served.version, ready=served.profile is not None)


def _risk(manifest: Manifest, max_risk: float | None) -> Risk | None:
    if max_risk is None or manifest.certificate is None:
        return None
    return Risk(epsilon=max_risk, delta=manifest.certificate.delta)


def _prediction(row: RowAnswer, labels: tuple[str, ...], probabilities: bool, wish: Wish) -> Prediction:
    by_label = dict(zip(labels, map(float, row.probabilities), strict=True)) if probabilities else None
    return Prediction(
        label=labels[row.label],
        confidence=row.confidence,
        depth=len(row.path),
        path=format_path(row.path),
        stopped_by=row.stopped_by,
        certified=row.stopped_by in ("risk", "complete") if wish.asked_as == "risk" else None,
        probabilities=by_label,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
