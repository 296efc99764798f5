"""Triton's stream of requests: each is answered in its turn, in one message or, where its parameter `rungs` says so, in one
for each rung of its climb."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc

from service.context import Context
from service.errors import BadRequest, NotReady, ServiceError
from service.oip.rpc.access import count_sent, note, note_model, request_of_stream
from service.oip.rpc.answering import Arrival, answer, answer_rungs
from service.oip.rpc.callers import token_of
from service.oip.rpc.messages import parse
from service.oip.rpc.status import status_of
from service.oip.rpc.stubs import open_inference_pb2 as pb
from service.responses import sentence

_FINAL = "triton_final_response"
_WANTS_FINAL = "triton_enable_empty_final_response"

Stream = grpc.aio.ServicerContext[bytes, bytes]


async def serve_stream(ctx: Context, method: str, stream: Stream, draining: asyncio.Event) -> None:
    """Answer the requests of a stream until its client ends it. A request that fails is told so in its place, and the next
    is read.

    Raises:
        NotReady: the server is `draining`; whatever was read has been answered.
    """
    first = True
    while (message := await _read(stream, draining)) is not None:
        with request_of_stream(len(message)):
            await _answer(ctx, message, Arrival.now(ctx, method, stream), stream, counted=first)
        first = False


async def _answer(ctx: Context, message: bytes, arrival: Arrival, stream: Stream, *, counted: bool) -> None:
    """Answer a request of a stream, or tell its error; `counted` says whether the key's rate has counted it already."""

    async def write(response: pb.ModelStreamInferResponse) -> None:
        sent = response.SerializeToString()
        count_sent(len(sent))
        await stream.write(sent)

    request = pb.ModelInferRequest()
    try:
        if ctx.keys is not None and not counted:
            ctx.keys.check(token_of(stream.invocation_metadata() or ()))
        request = parse(pb.ModelInferRequest, message)
        note_model(request)
        async with aclosing(_answers(ctx, request, arrival)) as answers:
            async for response in answers:
                await write(pb.ModelStreamInferResponse(infer_response=response))
    except ServiceError as error:
        ctx.metrics.refusals.labels(error.code).inc()
        note(status=status_of(error))
        refusal = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
        refusal.parameters["code"].string_param = error.code
        refusal.parameters[_FINAL].bool_param = True
        await write(pb.ModelStreamInferResponse(error_message=sentence(str(error)), infer_response=refusal))


async def _answers(ctx: Context, request: pb.ModelInferRequest, arrival: Arrival) -> AsyncGenerator[pb.ModelInferResponse]:
    """The answers to one request, the last of them marked as Triton marks it."""
    rungs = _wants_rungs(request)
    for name in ("rungs", _WANTS_FINAL):  # every last answer is marked, and none is empty
        if name in request.parameters:
            del request.parameters[name]
    if not rungs:
        response = await answer(ctx, request, arrival)
        response.parameters[_FINAL].bool_param = True
        yield response
        return
    async with aclosing(answer_rungs(ctx, request, arrival)) as responses:
        async for response in responses:
            response.parameters[_FINAL].bool_param = "queue_ms" in response.parameters
            yield response


def _wants_rungs(request: pb.ModelInferRequest) -> bool:
    if "rungs" not in request.parameters:
        return False
    wanted = request.parameters["rungs"]
    if wanted.WhichOneof("parameter_choice") != "bool_param":
        raise BadRequest("parameters: expected rungs to be a boolean")
    return wanted.bool_param


async def _read(stream: Stream, draining: asyncio.Event) -> bytes | None:
    """The next message of a stream; none after the last."""
    reading, drained = asyncio.ensure_future(stream.read()), asyncio.ensure_future(draining.wait())
    try:
        await asyncio.wait((reading, drained), return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise NotReady("the server is shutting down: go on with another")
        message = reading.result()
        return message if isinstance(message, bytes) else None
    finally:
        reading.cancel()
        drained.cancel()
