"""gRPC clients that leave, and calls that are open when the server ends: a runner that tests can hold back."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from tests.conftest import wait_for
from tests.e2e.held import HeldServer


@pytest.fixture
def stub(held: HeldServer) -> Iterator[service_pb2_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(held.rpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def request(**flags: bool) -> pb.ModelInferRequest:
    """One row that climbs to the end."""
    raw = np.float32([0.1, 0, 0, 0]).tobytes()
    message = pb.ModelInferRequest(model_name="fake", raw_input_contents=[raw])
    message.inputs.add(name="x", datatype="FP32", shape=[1, 2, 2])
    message.parameters["min_confidence"].double_param = 1.0
    for name, flag in flags.items():
        message.parameters[name].bool_param = flag
    return message


@pytest.mark.parametrize("how", ["cancelled", "deadline", "stream"])
def test_calls_that_leave_the_queue_cost_no_block(
    held: HeldServer, stub: service_pb2_grpc.GRPCInferenceServiceStub, how: str
) -> None:
    held.runner.go.clear()
    held.runner.began.clear()
    first = stub.ModelInfer.future(request())
    assert held.runner.began.wait(20)
    if how == "stream":
        waiting = [stub.ModelStreamInfer(iter([request()])) for _ in range(20)]
    else:  # a deadline far enough to be queued by, and as a budget one that lets the others wait
        waiting = [stub.ModelInfer.future(request(), timeout=2 if how == "deadline" else None) for _ in range(20)]
    wait_for(lambda: held.metric("hbll_queue_rows") == 20)
    if how != "deadline":
        for call in waiting:
            call.cancel()
    wait_for(lambda: held.metric('hbll_refusals_total{code="client_gone"}') == 20)
    assert held.metric('hbll_failed_seconds_count{model="fake",version="1"}') == 20
    assert {call.code() for call in waiting} == {
        grpc.StatusCode.DEADLINE_EXCEEDED if how == "deadline" else grpc.StatusCode.CANCELLED
    }
    held.runner.go.set()
    assert first.result(timeout=20).model_name == "fake"
    wait_for(lambda: held.metric("hbll_queue_rows") == 0)
    assert all(count == 1 for _, count, _ in held.runner.runs)
    assert held.metric('hbll_block_rows_total{model="fake",version="1"}') == 1 + 1 + 1 + 7  # the first call's climb, alone


def test_rungs_that_nobody_waits_for_do_not_run(held: HeldServer, stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
    """The first rung is answered; the client leaves while the second runs; the third never does."""
    second, left = threading.Event(), threading.Event()

    def before(nodes: tuple[int, ...]) -> None:
        if nodes == (6,):
            second.set()
            assert left.wait(20)

    held.runner.before = before
    call = stub.ModelStreamInfer(iter([request(rungs=True)]))
    assert next(call).infer_response.parameters["depth"].int64_param == 1
    assert second.wait(20)
    call.cancel()
    wait_for(lambda: held.metric('hbll_refusals_total{code="client_gone"}') == 1)
    left.set()
    last = request()
    last.parameters["min_confidence"].double_param = 0.0
    assert stub.ModelInfer(last).model_name == "fake"
    assert [nodes for nodes, _, _ in held.runner.runs] == [(4,), (6,), (4,)]


def test_more_calls_at_a_time_than_can_wait_are_refused(
    held: HeldServer, stub: service_pb2_grpc.GRPCInferenceServiceStub
) -> None:
    """Streams that ask nothing cost nothing but a place."""
    places = 1024 + 64
    release = threading.Event()

    def silent() -> Iterator[pb.ModelInferRequest]:
        release.wait(60)
        yield from ()

    calls = [stub.ModelStreamInfer(silent()) for _ in range(places + 20)]
    wait_for(lambda: sum(call.done() for call in calls) == 20)
    refused = [call for call in calls if call.done()]
    assert {call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    release.set()
    wait_for(lambda: all(call.done() for call in calls))
    assert stub.ServerLive(pb.ServerLiveRequest()).live


def test_a_server_that_ends_lets_calls_end_and_streams_that_ask_nothing_go(
    held: HeldServer, stub: service_pb2_grpc.GRPCInferenceServiceStub
) -> None:
    asked = threading.Event()

    def idle() -> Iterator[pb.ModelInferRequest]:
        yield request()
        asked.wait(60)

    stream = stub.ModelStreamInfer(idle())
    assert next(stream).infer_response.model_name == "fake"
    held.runner.go.clear()
    held.runner.began.clear()
    open_call = stub.ModelInfer.future(request())
    assert held.runner.began.wait(20)
    ending = threading.Thread(target=held.end)
    ending.start()
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "the server is shutting down: go on with another"
    with grpc.insecure_channel(held.rpc) as other, pytest.raises(grpc.RpcError) as caught:
        service_pb2_grpc.GRPCInferenceServiceStub(other).ServerLive(pb.ServerLiveRequest(), timeout=20)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    held.runner.go.set()
    assert open_call.result(timeout=20).model_name == "fake"
    asked.set()
    ending.join(timeout=20)
    assert not ending.is_alive()
