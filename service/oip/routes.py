"""The routes that tell: metadata, health, configuration, statistics, and the index of the repository."""

from __future__ import annotations

from enum import Enum
from importlib.metadata import version as installed_version
from typing import Literal, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ValidationError

from family.manifest import BundleError
from service import reload
from service.context import Context, Ctx, errors
from service.errors import BadRequest, NotReady
from service.keys import require_operator
from service.media import JSON, OCTETS, reading
from service.oip.schemas import (
    IndexEntry,
    IndexRequest,
    LoadRequest,
    ModelConfig,
    ModelMetadata,
    ModelReady,
    ServerMetadata,
    Statistics,
    TensorConfig,
    TensorMetadata,
    UnloadRequest,
)
from service.oip.statistics import statistics_of
from service.oip.tensors import OUTPUTS
from service.repository import ServedModel
from service.responses import describe
from service.schemas import Live, Ready
from service.version_policy import Versions
from service.versions import Served, for_models

router = APIRouter(redirect_slashes=False, route_class=reading(JSON, OCTETS, unnamed=True))

_DISTRIBUTION = "hbll-anytime"
_PLATFORM = "onnx_onnxv1"
_EXTENSIONS = [
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "statistics",
]
_TAGS: list[str | Enum] = ["open inference protocol"]

Body = TypeVar("Body", bound=BaseModel)


@router.get("/v2", tags=_TAGS, responses=errors(500))
@router.get("/v2/", tags=_TAGS, include_in_schema=False)
async def describe_server() -> ServerMetadata:
    """The server and the protocol's extensions that it serves."""
    return ServerMetadata(name=_DISTRIBUTION, version=installed_version(_DISTRIBUTION), extensions=_EXTENSIONS)


@router.get("/v2/health/live", tags=_TAGS, responses=errors(500, needs_key=False))
async def live() -> Live:
    """The process answers."""
    return Live(live=True)


@router.get("/v2/health/ready", tags=_TAGS, responses=errors(500, 503, needs_key=False))
async def ready(ctx: Ctx) -> Ready:
    """200 once every model is loaded and warm, 503 until then and while shutting down."""
    if not ctx.ready:
        raise NotReady("the server is warming up or shutting down: ask again in a second", ready=False)
    return Ready(ready=True)


@router.get("/v2/models/stats", tags=_TAGS, responses=errors(500))
async def all_statistics(ctx: Ctx) -> Statistics:
    """The statistics of all models. Before the routes of one, which would take `stats` for a model's name."""
    return Statistics(model_stats=[statistics_of(ctx.metrics, served) for served in ctx.repository.served])


@for_models(router, "/v2", "GET", "", tags=_TAGS, responses=errors(404, 500))
async def describe_model(served: Served, ctx: Ctx) -> ModelMetadata:
    """The model as a function of tensors. `/v1/models/{model}` tells what depths it has."""
    manifest = served.manifest
    spec = manifest.input
    return ModelMetadata(
        name=served.name,
        versions=[str(version) for version in ctx.repository.versions(served.name)],
        platform=_PLATFORM,
        inputs=[TensorMetadata(name=spec.name, datatype=spec.datatype, shape=list(spec.shape))],
        outputs=[
            TensorMetadata(name=output.name, datatype=output.datatype, shape=output.shape(-1, manifest))
            for output in OUTPUTS.values()
        ],
    )


@for_models(router, "/v2", "GET", "/ready", tags=_TAGS, responses=errors(404, 500, 503))
async def model_ready(served: Served, ctx: Ctx) -> ModelReady:
    """200 once the model answers, 503 until then and while shutting down."""
    if _state(ctx, served) != "READY":
        message = f"{served.name} is warming up or shutting down: ask again in a second"
        raise NotReady(message, name=served.name, ready=False)
    return ModelReady(name=served.name, ready=True)


@for_models(router, "/v2", "GET", "/config", tags=_TAGS, response_model_exclude_none=True, responses=errors(404, 500))
async def configuration(served: Served, ctx: Ctx) -> ModelConfig:
    """The model configuration extension: tensors without the axis of rows."""
    manifest = served.manifest

    def config(name: str, datatype: str, dims: list[int]) -> TensorConfig:
        data_type = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
        if dims:
            return TensorConfig(name=name, data_type=data_type, dims=dims)
        return TensorConfig(name=name, data_type=data_type, dims=[1], reshape={"shape": []})

    return ModelConfig(
        name=served.name,
        platform=_PLATFORM,
        backend="onnxruntime",
        max_batch_size=ctx.settings.max_request_rows,
        input=[config(manifest.input.name, manifest.input.datatype, list(manifest.input.shape[1:]))],
        output=[config(each.name, each.datatype, each.shape(-1, manifest)[1:]) for each in OUTPUTS.values()],
        dynamic_batching={},
        version_policy=_version_policy(ctx.settings.of_model(served.name).versions),
    )


@for_models(router, "/v2", "GET", "/stats", tags=_TAGS, responses=errors(404, 500))
async def model_statistics(served: Served, request: Request, ctx: Ctx) -> Statistics:
    """What the model has done since the server became ready; without a version in the URL, all its versions."""
    named = "version" in request.path_params
    versions = [served] if named else ctx.repository.versions(served.name).values()
    return Statistics(model_stats=[statistics_of(ctx.metrics, each) for each in versions])


@router.post(
    "/v2/repository/index",
    tags=_TAGS,
    responses=errors(400, 413, 415, 500),
    openapi_extra={"requestBody": {"content": {JSON: {"schema": IndexRequest.model_json_schema()}}}},
)
async def index(request: Request, ctx: Ctx) -> list[IndexEntry]:
    """The models in all versions that are served, those that should be and cannot, and those that were unloaded. The body
    may be empty."""
    asked = parse(IndexRequest, await request.body())
    return index_of(ctx, ready=asked.ready)


def index_of(ctx: Context, *, ready: bool) -> list[IndexEntry]:
    """The models that are or were served and those that are refused, or those that are `ready`."""
    entries = [
        IndexEntry(
            name=served.name,
            version=str(served.version),
            state=_state(ctx, served),
            reason=ctx.repository.stale.get(served.name, {}).get(served.version, ""),
        )
        for served in ctx.repository.served
    ] + [
        IndexEntry(name=name, version=str(version), state="UNAVAILABLE", reason=reason)
        for name, away in (*ctx.repository.refused.items(), *ctx.repository.unloaded.items())
        for version, reason in away.items()
    ]
    return [entry for entry in entries if entry.state == "READY" or not ready]


@router.post(
    "/v2/repository/models/{model}/load",
    tags=_TAGS,
    response_class=Response,  # an empty one, as Triton answers
    responses=errors(400, 403, 404, 413, 415, 422, 500, 503),
    dependencies=[Depends(require_operator)],
    openapi_extra={"requestBody": {"content": {JSON: {"schema": LoadRequest.model_json_schema()}}}},
)
async def load(model: str, request: Request, ctx: Ctx) -> Response:
    """Serve the versions of the model that its settings choose from the repository, now rather than when it is searched
    next, and again if it was unloaded. The body may be empty; what clients could give in it, another configuration or other
    files, is not taken."""
    parse(LoadRequest, await request.body())
    await load_newest(ctx, model)
    return Response()


async def load_newest(ctx: Context, model: str) -> None:
    """Serve the versions of the model that its settings choose from the repository.

    Raises:
        NotReady: the server is warming up or shutting down.
        BadRequest: a bundle is damaged, or one that is served was written over.
        UnknownModel: there is none of that name.
    """
    _require_ready(ctx)
    try:
        for failure in (await reload.load(ctx, model)).values():
            raise failure
    except (BundleError, OSError) as exc:
        raise BadRequest(f"{model} cannot be loaded: {exc}") from exc
    ctx.repository.get(model)  # or UnknownModel


@router.post(
    "/v2/repository/models/{model}/unload",
    tags=_TAGS,
    response_class=Response,
    responses=errors(400, 403, 404, 413, 415, 422, 500, 503),
    dependencies=[Depends(require_operator)],
    openapi_extra={"requestBody": {"content": {JSON: {"schema": UnloadRequest.model_json_schema()}}}},
)
async def unload(model: str, request: Request, ctx: Ctx) -> Response:
    """Serve the model no more, in no version, until it is loaded or the server starts anew. What it has been asked already
    is answered. The server stays ready. The body may be empty."""
    parse(UnloadRequest, await request.body())
    await withdraw(ctx, model)
    return Response()


async def withdraw(ctx: Context, model: str) -> None:
    """Serve the model no more.

    Raises:
        NotReady: the server is warming up or shutting down.
        UnknownModel: there is none of that name.
    """
    _require_ready(ctx)
    await reload.unload(ctx, model)


def parse(kind: type[Body], body: bytes) -> Body:
    """A body that may be empty, as one of this kind.

    Raises:
        BadRequest: it is none.
    """
    try:
        return kind.model_validate_json(body or b"{}")
    except ValidationError as exc:
        raise BadRequest(describe(exc.errors(include_url=False)[0])) from exc


def _require_ready(ctx: Context) -> None:
    if not ctx.ready:
        raise NotReady("the server is warming up or shutting down: ask again in a second")


def _state(ctx: Context, served: ServedModel) -> Literal["READY", "LOADING", "UNAVAILABLE"]:
    if ctx.answers(served):
        return "READY"
    return "UNAVAILABLE" if ctx.warm else "LOADING"


def _version_policy(versions: Versions) -> dict[str, dict[str, int | list[int]]]:
    """As Triton's model configuration has it."""
    if versions == "all":
        return {"all": {}}
    if isinstance(versions, tuple):
        return {"specific": {"versions": list(versions)}}
    return {"latest": {"num_versions": 1 if versions == "latest" else versions}}
