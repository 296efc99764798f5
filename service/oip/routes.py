"""The routes that tell: metadata, health, configuration, statistics, and the index of the repository."""

from __future__ import annotations

import asyncio
from enum import Enum
from importlib.metadata import version as installed_version
from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from family.manifest import BundleError
from service.context import Context, Ctx, errors
from service.errors import BadRequest, NotReady, NotSupported
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
)
from service.oip.statistics import statistics_of
from service.oip.tensors import OUTPUTS
from service.oip.versions import Served, for_models
from service.reload import load_version
from service.repository import ServedModel
from service.responses import describe
from service.schemas import Live, Ready

router = APIRouter(redirect_slashes=False, route_class=reading(JSON, OCTETS, unnamed=True))

_DISTRIBUTION = "hbll-anytime"
_PLATFORM = "onnx_onnxv1"
_EXTENSIONS = ["binary_tensor_data", "model_configuration", "parameters", "statistics"]
_TAGS: list[str | Enum] = ["open inference protocol"]


@router.get("/v2", tags=_TAGS, responses=errors(500))
@router.get("/v2/", tags=_TAGS, include_in_schema=False)
async def describe_server() -> ServerMetadata:
    """The server and the protocol's extensions that it serves."""
    return ServerMetadata(name=_DISTRIBUTION, version=installed_version(_DISTRIBUTION), extensions=_EXTENSIONS)


@router.get("/v2/health/live", tags=_TAGS, responses=errors(500))
async def live() -> Live:
    """The process answers."""
    return Live(live=True)


@router.get("/v2/health/ready", tags=_TAGS, responses=errors(500, 503))
async def ready(ctx: Ctx) -> Ready:
    """200 once every model is loaded and warm, 503 until then and while shutting down."""
    if not ctx.ready:
        raise NotReady("the server is warming up or shutting down: ask again in a second", ready=False)
    return Ready(ready=True)


@router.get("/v2/models/stats", tags=_TAGS, responses=errors(500))
async def all_statistics(ctx: Ctx) -> Statistics:
    """The statistics of all models. Before the routes of one, which would take `stats` for a model's name."""
    return Statistics(model_stats=[statistics_of(ctx.metrics, served) for served in ctx.repository.models.values()])


@for_models(router, "GET", "", tags=_TAGS, responses=errors(404, 500))
async def describe_model(served: Served) -> ModelMetadata:
    """The model as a function of tensors. `/v1/models/{model}` tells what depths it has."""
    manifest = served.manifest
    spec = manifest.input
    return ModelMetadata(
        name=served.name,
        versions=[str(served.version)],
        platform=_PLATFORM,
        inputs=[TensorMetadata(name=spec.name, datatype=spec.datatype, shape=list(spec.shape))],
        outputs=[
            TensorMetadata(name=output.name, datatype=output.datatype, shape=output.shape(-1, manifest))
            for output in OUTPUTS.values()
        ],
    )


@for_models(router, "GET", "/ready", tags=_TAGS, responses=errors(404, 500, 503))
async def model_ready(served: Served, ctx: Ctx) -> ModelReady:
    """200 once the model answers, 503 until then and while shutting down."""
    if state_of(ctx, served) != "READY":
        message = f"{served.name} is warming up or shutting down: ask again in a second"
        raise NotReady(message, name=served.name, ready=False)
    return ModelReady(name=served.name, ready=True)


@for_models(router, "GET", "/config", tags=_TAGS, response_model_exclude_none=True, responses=errors(404, 500))
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
    )


@for_models(router, "GET", "/stats", tags=_TAGS, responses=errors(404, 500))
async def model_statistics(served: Served, ctx: Ctx) -> Statistics:
    """What the model has done since the server became ready."""
    return Statistics(model_stats=[statistics_of(ctx.metrics, served)])


@router.post(
    "/v2/repository/index",
    tags=_TAGS,
    responses=errors(400, 413, 415, 500),
    openapi_extra={"requestBody": {"content": {JSON: {"schema": IndexRequest.model_json_schema()}}}},
)
async def index(request: Request, ctx: Ctx) -> list[IndexEntry]:
    """The models that are served, in the one version of each that is. The body may be empty."""
    body = await request.body()
    try:
        asked = IndexRequest.model_validate_json(body or b"{}")
    except ValidationError as exc:
        raise BadRequest(describe(exc.errors(include_url=False)[0])) from exc
    return index_of(ctx, ready=asked.ready)


def index_of(ctx: Context, *, ready: bool) -> list[IndexEntry]:
    """The models that are served, or those of them that are `ready`."""
    entries = [
        IndexEntry(name=served.name, version=str(served.version), state=state_of(ctx, served), reason="")
        for served in ctx.repository.models.values()
    ]
    return [entry for entry in entries if entry.state == "READY" or not ready]


@router.post(
    "/v2/repository/models/{model}/load",
    tags=_TAGS,
    responses=errors(400, 404, 413, 415, 422, 500, 503),
    openapi_extra={"requestBody": {"content": {JSON: {"schema": LoadRequest.model_json_schema()}}}},
)
async def load(model: str, request: Request, ctx: Ctx) -> Response:
    """Serve the highest version of the model in the repository, now rather than when it is searched next. The body may be
    empty; what clients could give in it, another configuration or other files, is not taken."""
    try:
        LoadRequest.model_validate_json(await request.body() or b"{}")
    except ValidationError as exc:
        raise BadRequest(describe(exc.errors(include_url=False)[0])) from exc
    await load_newest(ctx, model)
    return Response()


async def load_newest(ctx: Context, model: str) -> None:
    """Serve the highest version of the model in the repository.

    Raises:
        NotReady: the server is warming up or shutting down.
        BadRequest: the bundle is damaged.
        UnknownModel: there is none of that name.
    """
    if not ctx.ready:
        raise NotReady("the server is warming up or shutting down: ask again in a second")
    try:
        newest = await asyncio.to_thread(ctx.repository.newest)
        if model in newest:
            await load_version(ctx, model, newest[model])
    except (BundleError, OSError) as exc:
        raise BadRequest(f"{model} cannot be loaded: {exc}") from exc
    ctx.repository.get(model)  # or UnknownModel


@router.post("/v2/repository/models/{model}/unload", tags=_TAGS, responses=errors(404, 413, 415, 422, 500, 501))
async def unload(model: str, ctx: Ctx) -> None:
    """Not served: a model is replaced by its next version, and else served as long as the server runs."""
    ctx.repository.get(model)
    raise NotSupported("models are not unloaded while the server runs, but replaced by their next version")


def state_of(ctx: Context, served: ServedModel) -> Literal["READY", "LOADING", "UNAVAILABLE"]:
    """What the repository's index says of a model."""
    if ctx.ready and served.profile is not None:
        return "READY"
    return "UNAVAILABLE" if ctx.warm else "LOADING"
