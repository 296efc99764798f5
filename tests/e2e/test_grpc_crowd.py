"""Many gRPC calls at once, at a real server: it is stopped while they come, so that it finds all of them there."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import grpc
import httpx
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from tests.conftest import LiveServer, Trained, start_server
from tests.e2e.test_crowd import CROWD, refusals
from tests.e2e.test_grpc_clients import address


@pytest.fixture(scope="module")
def server(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with start_server(trained.models, tmp_path_factory.mktemp("crowd"), {"HBLL_GRPC_PORT": "0"}) as live:
        yield live


@pytest.fixture(scope="module")
def stub(server: LiveServer) -> Iterator[service_pb2_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(address(server)) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def request(budget_ms: float | None) -> pb.ModelInferRequest:
    """Of many rows, so that answers take longer than the server needs to see who else is there."""
    message = pb.ModelInferRequest(model_name="digits", raw_input_contents=[bytes(16 * 3136)])
    message.inputs.add(name="x", datatype="FP32", shape=[16, 28, 28])
    if budget_ms is not None:
        message.parameters["latency_budget_ms"].double_param = budget_ms
    return message


def test_in_a_crowd_who_is_late_is_refused_and_all_others_are_answered(
    server: LiveServer, stub: service_pb2_grpc.GRPCInferenceServiceStub
) -> None:
    budgets_ms = [None, 0.001, 60_000, 0.001] * (CROWD // 2)  # of which the queue has room for all
    before = refusals(server, "deadline_expired")
    server.process.send_signal(signal.SIGSTOP)
    try:
        calls = [stub.ModelInfer.future(request(budget_ms)) for budget_ms in budgets_ms]
    finally:
        server.process.send_signal(signal.SIGCONT)
    for call, budget_ms in zip(calls, budgets_ms, strict=True):
        if budget_ms == 0.001:
            assert call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            assert dict(call.trailing_metadata())["code"] == "deadline_expired"
        else:
            assert call.result(timeout=60).model_name == "digits"
    assert refusals(server, "deadline_expired") == before + CROWD
    assert httpx.get(f"{server.url}/metrics").text.count("hbll_unread_requests 0.0") == 1
