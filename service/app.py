"""The application: parts wired together, life cycle, middleware, error handlers."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from service import plan, predict, raw, routes
from service.access import Access
from service.context import Context
from service.decoding import Decoding
from service.description import complete
from service.direct import DirectRoutes
from service.engine import Engine
from service.errors import ServiceError
from service.gate import Gate
from service.keys import OPEN_PATHS, KeyCheck, Keys
from service.limits import LimitBody
from service.metrics import Metrics
from service.oip import infer as oip_infer
from service.oip import routes as oip_routes
from service.oip.rpc.gate import CallGate
from service.oip.rpc.port import check_grpc, open_rpc
from service.pauses import collect_when_idle, shorten_pauses, watch_pauses
from service.reload import watch_repository
from service.repository import Repository, ServedModel, open_repository
from service.responses import on_http_exception, on_service_error, on_validation_error
from service.settings import Settings
from service.tracing import open_tracer

logger = logging.getLogger(__name__)

_WARM_UP_REQUESTS = 20

DESCRIPTION = """Anytime inference: every request is answered by the member of a model's family that its wishes and its
latency budget allow. Wishes: an explicit `depth` or `path`, a `latency_budget_ms`, a `min_confidence`, a certified
`max_risk`. Every answer that is not a success has the shape `{"error": "<sentence>", "code": "<stable_code>"}`."""


def create_app(settings: Settings | None = None, repository: Repository | None = None) -> FastAPI:
    """Build the application; `uvicorn --factory service.app:create_app` works too, set by `HBLL_*` variables. What concerns
    the socket, its connections and the logs is then uvicorn's: `service.listener` and `service.logs` have no part in it.

    Models are checked and loaded here, so that a damaged bundle stops start-up; they are warmed up once it runs.

    Raises:
        BundleError: a bundle is damaged or missing; the message names the file.
        GrpcError: gRPC is wanted and cannot be had.
        KeysError: the file of API keys is missing or wrong.
        pydantic.ValidationError: a setting is wrong; the message names it.
    """
    settings = settings or Settings()
    check_grpc(settings)
    keys = Keys(settings.keys_file) if settings.keys_file is not None else None
    repository = repository or open_repository(settings)
    metrics = Metrics()
    tracer = open_tracer()
    gate, call_gate, decoding = Gate(lambda: engine.in_hand()), CallGate(), Decoding(os.cpu_count() or 1)

    def unread() -> int:
        return gate.waiting() + call_gate.waiting() + decoding.waiting()

    metrics.unread_requests.set_function(unread)
    engine = Engine(
        metrics,
        max_batch=settings.max_batch,
        max_queue_rows=settings.max_queue_rows,
        reserve_s=settings.reserve_ms / 1000,
        unread=unread,
        trace=tracer is not None,
    )

    context = Context(settings, repository, engine, metrics, tracer, keys, call_gate, decoding)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.rpc = await open_rpc(context)
        background = [asyncio.create_task(_warm_up_and_watch(app), name="warm-up")]
        idle = collect_when_idle(lambda: context.warm and engine.idle)
        background.append(asyncio.create_task(idle, name="garbage collection"))
        if keys is not None:
            background.append(asyncio.create_task(keys.watch(), name="keys"))
        with watch_pauses(lambda pause_s: metrics.gc_seconds.observe(pause_s) if app.state.context.warm else None):
            yield
        await drain_rpc(app)  # begun already under `service.listener.Server`
        await engine.stop()
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        if tracer is not None:
            await asyncio.to_thread(tracer.close)

    app = _App(
        title="HBLL anytime inference",
        version=version("hbll-anytime"),
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # `service.tracing` and `service.metrics` tell more
        exception_handlers={
            ServiceError: on_service_error,
            HTTPException: on_http_exception,
            RequestValidationError: on_validation_error,
        },
    )
    app.state.context = context
    app.state.metrics = metrics
    app.state.gate = gate
    # Tried in order: first those that answer.
    for router in (predict.router, predict.stream_router, oip_infer.router):
        app.include_router(router)
    for router in (routes.router, plan.router, oip_routes.router):
        app.include_router(router)
    # Each around those before it.
    app.add_middleware(DirectRoutes, routes=(*raw.direct_routes, *predict.direct_routes, *oip_infer.direct_routes))
    app.add_middleware(LimitBody, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    if keys is not None:
        open_paths = OPEN_PATHS if settings.metrics_need_key else OPEN_PATHS | {"/metrics"}
        app.add_middleware(KeyCheck, keys=keys, open_paths=open_paths)
    app.add_middleware(Access, log=settings.access_log)
    return app


def end_soon(app: FastAPI) -> None:
    """Say no more that the server is ready, if it was not by now. What is open goes on: see `drain_rpc`."""
    app.state.context.told_to_end = True


async def drain_rpc(app: FastAPI) -> None:
    """Take no more calls of gRPC and wait for those that are open. HTTP is drained by who listens."""
    rpc = getattr(app.state, "rpc", None)  # told to stop before it had started, or without it
    if rpc is not None:
        await rpc.drain()


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """FastAPI's document and what it does not know of."""
        return self.openapi_schema or complete(super().openapi())


async def _warm_up_and_watch(app: FastAPI) -> None:
    await _warm_up(app)
    await watch_repository(app.state.context)


async def _warm_up(app: FastAPI) -> None:
    """Measure every model, then send the app some requests of its own: the first answer of a process takes several
    times as long as the later ones, and no client should be the one to wait for it."""
    context: Context = app.state.context
    models = context.repository.served
    try:
        await context.engine.start(models)
        if not context.engine.ready:  # told to stop meanwhile
            return
        transport = httpx.ASGITransport(_internal(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://warm-up") as client:
            for model in models:
                for _ in range(_WARM_UP_REQUESTS):
                    for url, body in _warm_up_requests(model):
                        response = await client.post(url, json=body)
                        if context.ending:
                            return
                        if response.is_error:  # tight limits may refuse ours, and are no reason not to serve
                            logger.info("warm-up of version %d of %s: %s", model.version, model.name, response.text)
                            break
    except Exception:
        # The server stays up and unready, so that probes and people can see it.
        logger.exception("warm-up failed; the server will not become ready")
        raise
    if context.ending:
        return
    context.metrics.clear()
    shorten_pauses()
    context.warm = True
    logger.info("ready: serving %s", ", ".join(f"{model.name} {model.version}" for model in models))


def _internal(app: ASGIApp) -> ASGIApp:
    """The app for the server's own requests: marked as such where no client can, they need no key and are not logged."""

    async def marked(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": {"internal": True}}, receive, send)

    return marked


def _warm_up_requests(model: ServedModel) -> list[tuple[str, dict[str, object]]]:
    """By URL: requests with a nested list, with a tensor, and where the model takes images with one."""
    shape = model.manifest.input.shape[1:]
    url = f"models/{model.name}/versions/{model.version}"
    predict_url, infer_url = f"/v1/{url}/predict", f"/v2/{url}/infer"
    zeros = np.zeros((1, *shape), model.manifest.input.code)
    spec = model.manifest.input
    tensor = {"name": spec.name, "shape": zeros.shape, "datatype": spec.datatype, "data": zeros.tolist()}
    requests: list[tuple[str, dict[str, object]]] = [
        (predict_url, {"inputs": zeros.tolist(), "probabilities": True, "min_confidence": 1}),
        (infer_url, {"inputs": [tensor], "parameters": {"binary_data_output": True}}),
    ]
    if model.manifest.image is not None:
        png = io.BytesIO()
        Image.new("L", (model.manifest.image.width, model.manifest.image.height)).save(png, "PNG")
        image = {"image": base64.b64encode(png.getvalue()).decode()}
        requests.append((predict_url, {"inputs": [image], "depth": "best"}))
    return requests
