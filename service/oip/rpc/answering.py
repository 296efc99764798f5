"""Requests for answers, of both RPCs that take them: to the engine and back, counted and traced."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import ClassVar

import grpc

from service.answers import Answer, RowAnswer
from service.context import Context, milliseconds
from service.errors import BadRequest, ClientGone, DeadlineExpired, InvalidInput, ServiceError
from service.oip.inference import Inference, describe_answer, open_inference
from service.oip.rpc.access import note
from service.oip.rpc.messages import parameters_of, read_request, values_of, write_response
from service.oip.rpc.status import status_of
from service.oip.rpc.stubs import open_inference_pb2 as pb
from service.oip.wire import read_parameters
from service.wishes import with_headers


@dataclass(frozen=True, slots=True)
class Arrival:
    """What is known of a request beside its message: the RPC's `method`, when it came on the monotonic clock, how long its
    client waits, and the call's metadata. The `Arrival` of a `service.call.Call` that came by gRPC."""

    leaving: ClassVar[tuple[type[BaseException], ...]] = (asyncio.CancelledError, GeneratorExit)  # or it waits no more

    method: str
    arrived_s: float
    patience_s: float | None
    metadata: Sequence[tuple[bytes, bytes]]

    @classmethod
    def now(cls, ctx: Context, method: str, call: grpc.aio.ServicerContext[bytes, bytes]) -> Arrival:
        """Of a message that the event loop has just been handed."""
        metadata = [
            (name.encode(), value if isinstance(value, bytes) else value.encode())
            for name, value in call.invocation_metadata() or ()
        ]
        now_s, left_s = time.monotonic(), call.time_remaining()
        arrived_s = ctx.call_gate.came_s(now_s)
        return cls(method, arrived_s, None if left_s is None else left_s + now_s - arrived_s, metadata)

    def budget_s(self, request: pb.ModelInferRequest) -> float | None:
        """The budget of its message, as far as that shows before all of it is read. Where something is wrong, whoever reads
        it will say so."""
        try:
            budget_ms = with_headers(read_parameters(parameters_of(request)), self.metadata).budget_ms
        except (ServiceError, ValueError):
            budget_ms = None
        budgets_s = (budget_ms and budget_ms / 1000, self.patience_s)
        return min((budget_s for budget_s in budgets_s if budget_s is not None), default=None)

    def note(self, answer: Answer, deadline_met: bool | None, budget_ms: float | None) -> None:
        """See `service.call.Arrival`."""
        note(answer=answer, deadline_met=deadline_met, budget_ms=budget_ms)

    def note_expired(self, budget_ms: float) -> None:
        """See `service.call.Arrival`; nobody else wants to hear of it."""

    def span(self, error: ServiceError | None) -> tuple[str, dict[str, str | int], str | None]:
        """See `service.call.Arrival`."""
        service, _, name = self.method.partition("/")
        status = grpc.StatusCode.OK if error is None else status_of(error)
        attributes: dict[str, str | int] = {
            "rpc.system": "grpc",
            "rpc.service": service,
            "rpc.method": name,
            "rpc.grpc.status_code": status.value[0],
        }
        traceparent = next((value.decode("latin-1") for name, value in self.metadata if name == b"traceparent"), None)
        return self.method, attributes, traceparent


async def answer(ctx: Context, request: pb.ModelInferRequest, arrival: Arrival) -> pb.ModelInferResponse:
    """Answer each row at the depth that the wishes and the budget allow.

    Raises:
        ServiceError: as over REST.
    """
    async with _passed(ctx, request, arrival):
        begun_s = time.monotonic()
        inference = _open(ctx, request, arrival)
        call = inference.call
        try:
            with call:
                found = await ctx.engine.submit(call.served, inference.x, call.wish, call.arrived_s, on_loop=False)
        except DeadlineExpired:
            if call.budget_s is not None:
                ctx.call_gate.pace.ended(call.budget_s, begun_s, None, time.monotonic())
            raise
        parameters = describe_answer(call, found, call.answered(found))
        response = write_response(inference, request.id, parameters, found.rows)
        if call.budget_s is not None:
            ctx.call_gate.pace.ended(call.budget_s, begun_s, found, time.monotonic())
        return response


async def answer_rungs(
    ctx: Context, request: pb.ModelInferRequest, arrival: Arrival
) -> AsyncGenerator[pb.ModelInferResponse]:
    """The answers of one row, rung by rung as soon as each is known. A request without a wish climbs to the end. Closing
    the iterator cancels the rest.

    Raises:
        InvalidInput: there are several rows.
        ServiceError: as over REST; rungs may have been answered before.
    """
    inference = _open(ctx, request, arrival, climb=True)
    call = inference.call
    if len(inference.x) != 1:
        raise InvalidInput(f"rungs: expected one row, got {len(inference.x)}")
    rungs: asyncio.Queue[RowAnswer | None] = asyncio.Queue()  # as many as the ladder has at most

    def on_answer(_: int, rung: RowAnswer) -> None:
        rungs.put_nowait(rung)

    work = ctx.engine.submit(call.served, inference.x, call.wish, call.arrived_s, on_answer, on_loop=False)
    running = asyncio.ensure_future(work)
    running.add_done_callback(lambda _: rungs.put_nowait(None))
    try:
        with call:
            while (rung := await rungs.get()) is not None:
                if rung.stopped_by is None:
                    parameters = {"depth": len(rung.path), "total_ms": milliseconds(call.total_s)}
                    yield write_response(inference, request.id, parameters, [rung])
            found = await running
        parameters = describe_answer(call, found, call.answered(found, streamed=True))
        yield write_response(inference, request.id, parameters, found.rows)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@asynccontextmanager
async def _passed(ctx: Context, request: pb.ModelInferRequest, arrival: Arrival) -> AsyncGenerator[None]:
    """Through the gate, where a crowd waits."""
    try:
        await ctx.call_gate.enter(arrival.arrived_s, lambda: arrival.budget_s(request))
    except asyncio.CancelledError:
        ctx.metrics.refusals.labels(ClientGone.code).inc()
        raise
    try:
        yield
    finally:
        ctx.call_gate.leave()


def _open(ctx: Context, request: pb.ModelInferRequest, arrival: Arrival, *, climb: bool = False) -> Inference:
    served = ctx.repository.get(request.model_name, request.model_version or None)
    inference = open_inference(
        ctx,
        served,
        read_request(request),
        values_of(request),
        arrival.metadata,
        arrival,
        binary=bool(request.raw_input_contents),  # an answer is of its request's kind
        climb=climb,
        at_most_ms=None if arrival.patience_s is None else 1000 * arrival.patience_s,
    )
    if len({binary for _, binary in inference.wanted}) > 1:  # a response cannot tell them apart
        raise BadRequest("outputs: expected binary_data to be the same for all of them, got both")
    return inference
