"""The routes that tell: models, health, metrics."""

from __future__ import annotations

from enum import Enum

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, PlainTextResponse

from family.tree import format_path
from service.context import Context, Ctx, errors, milliseconds
from service.errors import NotReady
from service.memory import PARAMETER_BYTES
from service.profile import Segment
from service.repository import ServedModel
from service.schemas import (
    Live,
    ModelDetail,
    ModelList,
    ModelMemory,
    ModelSummary,
    ModelVersions,
    PathSummary,
    Readiness,
    VersionSummary,
)
from service.versions import Served, for_models

router = APIRouter(redirect_slashes=False)

_TAGS: list[str | Enum] = ["models"]


@router.get("/v1/models", tags=_TAGS, responses=errors(500))
async def list_models(ctx: Ctx) -> ModelList:
    """The served models, each in the version that answers where none is named."""
    return ModelList(models=[_summary(ctx, served) for served in ctx.repository.models.values()])


@router.get("/v1/models/{model}/versions", tags=_TAGS, responses=errors(404, 422, 500))
async def list_versions(model: str, ctx: Ctx) -> ModelVersions:
    """The versions of a model: those that are served, and those that should be and cannot."""
    served = ctx.repository.versions(model)
    versions = [
        VersionSummary(
            version=version,
            ready=ctx.answers(each),
            default=each is ctx.repository.get(model),
            reason=ctx.repository.stale.get(model, {}).get(version),
        )
        for version, each in served.items()
    ]
    refused = [
        VersionSummary(version=version, ready=False, default=False, reason=reason)
        for version, reason in ctx.repository.refused.get(model, {}).items()
    ]
    policy = ctx.settings.of_model(model).versions
    return ModelVersions(name=model, policy=policy, versions=sorted(versions + refused, key=lambda each: -each.version))


@for_models(router, "/v1", "GET", "/ready", tags=_TAGS, responses=errors(404, 500, 503))
async def model_ready(served: Served, ctx: Ctx) -> ModelSummary:
    """200 once the model answers, 503 until then and while shutting down."""
    if not ctx.answers(served):
        raise NotReady(f"version {served.version} of {served.name} is not ready: ask again in a second", ready=False)
    return _summary(ctx, served)


@for_models(router, "/v1", "GET", "", tags=_TAGS, responses=errors(404, 500))
async def describe_model(served: Served, ctx: Ctx) -> ModelDetail:
    """What a model offers: every path with its accuracy, its latency here, and what it takes in memory."""
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
            weights_bytes=PARAMETER_BYTES * entry.parameters,
            pareto=path in front,
            best_of_depth=path in best,
        )
        for path, entry in manifest.offered.items()
        if path in served_paths
    ]
    return ModelDetail(
        **_summary(ctx, served).model_dump(),
        hierarchy_depth=manifest.hierarchy_depth,
        input_shape=list(manifest.input.shape[1:]),
        input_datatype=manifest.input.datatype,
        features=list(manifest.features) if manifest.features is not None else None,
        labels=list(manifest.labels),
        reference=format_path(climb[-1]),
        climb=[format_path(path) for path in climb],
        risk_levels=[level.epsilon for level in manifest.certificate.levels] if certified and manifest.certificate else [],
        memory=ModelMemory(
            weights_bytes=served.weights_bytes,
            separate_bytes=sum(path.weights_bytes for path in paths),
            grown_bytes=served.grown_bytes,
        ),
        paths=paths,
    )


@router.get("/health/live", tags=["health"], responses=errors(needs_key=False))
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
    alarms: dict[str, list[float]] = {}
    for served in ctx.repository.served:
        drift = ctx.engine.drift(served)
        if drift is not None and drift.raised:
            alarms[served.name] = sorted({*alarms.get(served.name, ()), *drift.raised})
    return JSONResponse({"ready": is_ready, "drift_alarms": alarms}, 200 if is_ready else 503)


@router.get("/metrics", tags=["health"], response_class=PlainTextResponse, responses=errors())
async def metrics(ctx: Ctx) -> Response:
    """Prometheus exposition."""
    ctx.metrics.ready.set(ctx.ready)
    return Response(ctx.metrics.render({served.labels for served in ctx.repository.served}), media_type=CONTENT_TYPE_LATEST)


def _summary(ctx: Context, served: ServedModel) -> ModelSummary:
    versions = list(ctx.repository.versions(served.name))
    return ModelSummary(name=served.name, version=served.version, ready=ctx.answers(served), versions=versions)
