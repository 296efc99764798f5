"""The routes that tell: models, health, metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, PlainTextResponse

from family.tree import format_path
from service.context import Ctx, errors, milliseconds
from service.profile import Segment
from service.repository import ServedModel
from service.schemas import Live, ModelDetail, ModelList, ModelSummary, PathSummary, Readiness

router = APIRouter(redirect_slashes=False)


@router.get("/v1/models", tags=["models"], responses=errors(500))
async def list_models(ctx: Ctx) -> ModelList:
    """The served models."""
    return ModelList(models=[_summary(served) for served in ctx.repository.models.values()])


@router.get("/v1/models/{model}", tags=["models"], responses=errors(404, 422, 500))
async def describe_model(model: str, ctx: Ctx) -> ModelDetail:
    """What a model offers: every path with its accuracy and its latency here."""
    served = ctx.repository.get(model)
    manifest = served.manifest
    served_paths = served.accuracies
    best, front = set(manifest.best_by_depth.values()), set(served.front)
    climb = served.climb
    certified = manifest.certificate is not None and manifest.climb[0] in served_paths
    paths = [
        PathSummary(
            path=entry.path,
            depth=len(path),
            accuracy=entry.validation.accuracy,
            test_accuracy=entry.test.accuracy,
            agreement=entry.validation.agreement,
            latency_ms=milliseconds(served.latency_s(Segment(path, embed=True), 1)) if served.profile else None,
            flops=entry.flops,
            parameters=entry.parameters,
            pareto=path in front,
            best_of_depth=path in best,
        )
        for path, entry in manifest.offered.items()
        if path in served_paths
    ]
    return ModelDetail(
        **_summary(served).model_dump(),
        hierarchy_depth=manifest.hierarchy_depth,
        input_shape=list(manifest.input.shape[1:]),
        features=list(manifest.features) if manifest.features is not None else None,
        labels=list(manifest.labels),
        reference=format_path(climb[-1]),
        climb=[format_path(path) for path in climb],
        risk_levels=[level.epsilon for level in manifest.certificate.levels] if certified and manifest.certificate else [],
        paths=paths,
    )


@router.get("/health/live", tags=["health"])
async def live() -> Live:
    """The process answers."""
    return Live(live=True)


@router.get(
    "/health/ready",
    tags=["health"],
    response_model=Readiness,
    responses={503: {"model": Readiness, "description": "Not ready"}},
)
async def ready(ctx: Ctx) -> Response:
    """200 once every model is loaded and warm, 503 until then and while shutting down."""
    is_ready = ctx.ready
    drifts = {name: ctx.engine.drift(served) for name, served in ctx.repository.models.items()}
    alarms = {name: drift.raised for name, drift in drifts.items() if drift is not None and drift.raised}
    return JSONResponse({"ready": is_ready, "drift_alarms": alarms}, 200 if is_ready else 503)


@router.get("/metrics", tags=["health"], response_class=PlainTextResponse)
async def metrics(ctx: Ctx) -> Response:
    """Prometheus exposition."""
    ctx.metrics.ready.set(ctx.ready)
    return Response(ctx.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _summary(served: ServedModel) -> ModelSummary:
    return ModelSummary(name=served.name, version=served.version, ready=served.profile is not None)
