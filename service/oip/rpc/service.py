"""The RPCs: each a message in, what `service.oip` does about it, a message out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import NoReturn, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from service.context import Context
from service.errors import BadRequest, ClientGone, NotSupported, ServiceError, UnknownService
from service.oip import routes
from service.oip.rpc.access import note, note_model
from service.oip.rpc.answering import Arrival, answer
from service.oip.rpc.messages import in_time, parse, told
from service.oip.rpc.names import HEALTH, INFERENCE
from service.oip.rpc.status import abort
from service.oip.rpc.streams import serve_stream
from service.oip.rpc.stubs import open_inference_pb2 as pb
from service.oip.schemas import Statistics
from service.oip.statistics import statistics_of
from service.repository import ServedModel

logger = logging.getLogger(__name__)

Request = TypeVar("Request", bound=Message)
_OfModel = pb.ModelReadyRequest | pb.ModelMetadataRequest | pb.ModelConfigRequest | pb.ModelStatisticsRequest
Call = grpc.aio.ServicerContext[bytes, bytes]


class Service:
    """Both services of the port. Every call comes through `_guarded`, with its message as bytes."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._draining = asyncio.Event()

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """What a server is given."""
        methods = {
            "ServerLive": self._unary(pb.ServerLiveRequest, self._server_live),
            "ServerReady": self._unary(pb.ServerReadyRequest, self._server_ready),
            "ModelReady": self._unary(pb.ModelReadyRequest, self._model_ready),
            "ServerMetadata": self._unary(pb.ServerMetadataRequest, self._server_metadata),
            "ModelMetadata": self._unary(pb.ModelMetadataRequest, self._model_metadata),
            "ModelConfig": self._unary(pb.ModelConfigRequest, self._model_config),
            "ModelStatistics": self._unary(pb.ModelStatisticsRequest, self._model_statistics),
            "RepositoryIndex": self._unary(pb.RepositoryIndexRequest, self._index),
            "RepositoryModelLoad": self._unary(pb.RepositoryModelLoadRequest, self._load),
            "RepositoryModelUnload": self._unary(pb.RepositoryModelUnloadRequest, self._unload),
            "ModelInfer": grpc.stream_unary_rpc_method_handler(self._infer),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._stream),
        }
        health = {"Check": self._unary(health_pb2.HealthCheckRequest, self._check)}
        return (
            grpc.method_handlers_generic_handler(INFERENCE, methods),
            grpc.method_handlers_generic_handler(HEALTH, health),
            _Everything(grpc.stream_stream_rpc_method_handler(self._unknown)),
        )

    def drain(self) -> None:
        """End the streams whose clients ask nothing just now."""
        self._draining.set()

    async def _guarded(self, call: Call, work: Awaitable[Message | None]) -> bytes:
        """The result of `work`, or the status of its error."""
        try:
            response = await work
            return b"" if response is None else response.SerializeToString()
        except ServiceError as error:
            await self._abort(call, error)
        except Exception as exc:
            if isinstance(exc, grpc.aio.BaseError | grpc.RpcError):  # the client has gone
                raise
            logger.exception("unhandled error in a gRPC call")
            await self._abort(call, ServiceError("the server met an error of its own; its log has the cause"))

    async def _abort(self, call: Call, error: ServiceError) -> NoReturn:
        self._ctx.metrics.refusals.labels(error.code).inc()
        await abort(call, error)

    def _unary(
        self, kind: type[Request], behaviour: Callable[[Request], Awaitable[Message]]
    ) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def work(call: Call) -> Message:
            request = parse(kind, await self._message(call))
            note_model(request)
            return await behaviour(request)

        async def handle(_: object, call: Call) -> bytes:
            return await self._guarded(call, work(call))

        return grpc.stream_unary_rpc_method_handler(handle)

    async def _infer(self, _: object, call: Call) -> bytes:
        async def work() -> Message:
            message = await self._message(call)
            arrival = Arrival.now(self._ctx, f"{INFERENCE}/ModelInfer", call)
            request = parse(pb.ModelInferRequest, message)
            note_model(request)
            return await answer(self._ctx, request, arrival)

        return await self._guarded(call, work())

    async def _message(self, call: Call) -> bytes:
        """The message of a call that has one. To the library these are calls with streams of messages: for a single one it
        would wait as long as the client likes."""
        message = await in_time(call.read(), self._ctx.settings.body_timeout_s)
        if not isinstance(message, bytes):
            raise ClientGone("the client ended the call before its message was whole")
        note(bytes_in=len(message))
        return message

    async def _stream(self, _: object, call: Call) -> None:
        await self._guarded(call, serve_stream(self._ctx, f"{INFERENCE}/ModelStreamInfer", call, self._draining))

    async def _unknown(self, _: object, call: Call) -> None:
        async def work() -> None:
            raise NotSupported(f"there is no such call here: expected one of {INFERENCE} or {HEALTH}")

        await self._guarded(call, work())

    async def _server_live(self, _: pb.ServerLiveRequest) -> Message:
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, _: pb.ServerReadyRequest) -> Message:
        return pb.ServerReadyResponse(ready=self._ctx.ready)

    async def _model_ready(self, request: pb.ModelReadyRequest) -> Message:
        if request.name in self._ctx.repository.unloaded:  # Triton's clients expect an answer, and take an error for none
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._ctx.answers(self._served(request)))

    async def _server_metadata(self, _: pb.ServerMetadataRequest) -> Message:
        return told(await routes.describe_server(), pb.ServerMetadataResponse())

    async def _model_metadata(self, request: pb.ModelMetadataRequest) -> Message:
        return told(await routes.describe_model(self._served(request), self._ctx), pb.ModelMetadataResponse())

    async def _model_config(self, request: pb.ModelConfigRequest) -> Message:
        config = await routes.configuration(self._served(request), self._ctx)
        return pb.ModelConfigResponse(config=told(config, pb.ModelConfig()))

    async def _model_statistics(self, request: pb.ModelStatisticsRequest) -> Message:
        repository = self._ctx.repository
        models: Iterable[ServedModel] = repository.versions(request.name).values() if request.name else repository.served
        if request.version:
            models = [self._served(request)]
        statistics = Statistics(model_stats=[statistics_of(self._ctx.metrics, served) for served in models])
        return told(statistics, pb.ModelStatisticsResponse())

    async def _index(self, request: pb.RepositoryIndexRequest) -> Message:
        response = pb.RepositoryIndexResponse()
        for entry in routes.index_of(self._ctx, ready=request.ready):
            response.models.append(told(entry, pb.RepositoryIndexResponse.ModelIndex()))
        return response

    async def _load(self, request: pb.RepositoryModelLoadRequest) -> Message:
        if request.parameters:
            raise BadRequest(f"parameters: expected none, got {min(request.parameters)[:40]!r}")
        await routes.load_newest(self._ctx, request.model_name)
        return pb.RepositoryModelLoadResponse()

    async def _unload(self, request: pb.RepositoryModelUnloadRequest) -> Message:
        for name, chosen in request.parameters.items():
            if name != "unload_dependents" or not chosen.HasField("bool_param"):
                raise BadRequest(f"parameters: expected unload_dependents, a boolean, or none, got {name[:40]!r}")
        await routes.withdraw(self._ctx, request.model_name)
        return pb.RepositoryModelUnloadResponse()

    async def _check(self, request: health_pb2.HealthCheckRequest) -> Message:
        """See github.com/grpc/grpc, doc/health-checking.md."""
        if request.service not in ("", INFERENCE, HEALTH):
            raise UnknownService(f"no gRPC service {request.service[:80]!r} is served here: expected {INFERENCE}")
        response: Message = health_pb2.HealthCheckResponse(status="SERVING" if self._ctx.ready else "NOT_SERVING")
        return response

    def _served(self, request: _OfModel) -> ServedModel:
        return self._ctx.repository.get(request.name, request.version or None)


class _Everything(grpc.GenericRpcHandler):
    """Takes whatever call the handlers before it do not: of any kind, which a stream of streams can be."""

    def __init__(self, handler: grpc.RpcMethodHandler[bytes, bytes]) -> None:
        self._handler = handler

    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        """See grpc.GenericRpcHandler."""
        return self._handler
