"""gRPC clients that open a call and say nothing in it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton

from tests.e2e.held import HeldServer

SERVICE = "inference.GRPCInferenceService"
Answers = queue.Queue[tuple[triton.InferResult, Exception | None]]
PIXELS = np.float32([[[0.1, 0], [0, 0]]])


@pytest.fixture(scope="module")
def impatient() -> Iterator[HeldServer]:
    server = HeldServer(body_timeout_s=1)
    yield server
    server.close()


@pytest.fixture
def channel(impatient: HeldServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(impatient.rpc) as channel:
        yield channel


def say_nothing(channel: grpc.Channel, method: str) -> grpc.RpcError:
    """What becomes of a call without a message, which is open until the server ends it."""
    ended = threading.Event()

    def nothing() -> Iterator[bytes]:
        ended.wait(60)
        yield from ()

    try:
        with pytest.raises(grpc.RpcError) as caught:
            channel.stream_unary(f"/{method}")(nothing(), timeout=60)
        return caught.value
    finally:
        ended.set()


def row() -> triton.InferInput:
    tensor = triton.InferInput("x", PIXELS.shape, "FP32")
    tensor.set_data_from_numpy(PIXELS)
    return tensor


def assert_answered(answers: Answers) -> None:
    result, error = answers.get(timeout=20)
    assert error is None
    assert result.get_response().model_name == "fake"


@pytest.mark.parametrize(
    "method",
    [f"{SERVICE}/ModelInfer", f"{SERVICE}/ServerMetadata", "grpc.health.v1.Health/Check"],
)
def test_a_call_without_a_message_ends_as_a_body_that_does_not_come(
    impatient: HeldServer, channel: grpc.Channel, method: str
) -> None:
    before = impatient.metric('hbll_refusals_total{code="request_timeout"}')
    error = say_nothing(channel, method)
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.details() == "expected a whole message within 1 s, got none"
    told = dict(error.trailing_metadata())
    assert told["code"] == "request_timeout"
    assert len(told["x-request-id"]) == 32
    assert "connection" not in told, "HTTP/2 has no such header"
    assert impatient.metric('hbll_refusals_total{code="request_timeout"}') == before + 1


@pytest.mark.parametrize("method", [f"{SERVICE}/ModelInfer", f"{SERVICE}/ServerLive"])
def test_a_call_that_ends_without_a_message_is_told_so(channel: grpc.Channel, method: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.stream_unary(f"/{method}")(iter(()), timeout=60)
    assert caught.value.code() == grpc.StatusCode.CANCELLED
    assert dict(caught.value.trailing_metadata())["code"] == "client_gone"


def test_who_waits_for_an_answer_is_not_silent(impatient: HeldServer, channel: grpc.Channel) -> None:
    impatient.runner.go.clear()
    impatient.runner.began.clear()
    answers: Answers = queue.Queue()
    with triton.InferenceServerClient(impatient.rpc) as client:
        client.async_infer("fake", [row()], lambda result, error: answers.put((result, error)))
        assert impatient.runner.began.wait(20)
        say_nothing(channel, f"{SERVICE}/ModelInfer")  # for as long as a call may be silent
        impatient.runner.go.set()
        assert_answered(answers)


def test_a_stream_may_be_silent_for_as_long_as_it_likes(impatient: HeldServer, channel: grpc.Channel) -> None:
    answers: Answers = queue.Queue()
    with triton.InferenceServerClient(impatient.rpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for _ in range(2):
            say_nothing(channel, f"{SERVICE}/ModelInfer")  # for as long as a call may be silent
            client.async_stream_infer("fake", [row()])
            assert_answered(answers)
