"""The access log and request ids of gRPC: what `test_keys` has of HTTP."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from service.app import create_app
from service.keyring import add_key
from service.settings import Settings
from tests.conftest import Trained, wait_for
from tests.contract.conftest import Client

SECRET = "what-nobody-may-read"
SERVICE = "/inference.GRPCInferenceService"
OK, CANCELLED = grpc.StatusCode.OK.value[0], grpc.StatusCode.CANCELLED.value[0]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    tokens = {name: add_key(file, name, rate=rate, admin=False) for name, rate in (("alice", None), ("few", "2/hour"))}
    return tokens | {"file": str(file)}


@pytest.fixture(scope="module")
def channel(trained: Trained, tokens: dict[str, str]) -> Iterator[grpc.Channel]:
    settings = Settings(models=trained.models, grpc_port=0, keys_file=Path(tokens["file"]), access_log=True)
    with Client(create_app(settings)) as client, grpc.insecure_channel(client.rpc) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> service_pb2_grpc.GRPCInferenceServiceStub:
    return service_pb2_grpc.GRPCInferenceServiceStub(channel)


def request(model: str = "digits", **numbers: float) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name=model, raw_input_contents=[bytes(3136)])
    message.inputs.add(name="x", datatype="FP32", shape=[1, 28, 28])
    for name, number in numbers.items():
        if isinstance(number, int):
            message.parameters[name].int64_param = number
        else:
            message.parameters[name].double_param = number
    return message


def told(lines: list[logging.LogRecord], count: int, *fields: str) -> list[tuple[object, ...]]:
    """Of so many lines, the last of which may be written only after its client has had its answer."""
    wait_for(lambda: len(lines) >= count)
    return [tuple(getattr(line, field) for field in fields) for line in lines]


def refused(call: object) -> dict[str, str]:
    """The trailing metadata of a call that fails."""
    with pytest.raises(grpc.RpcError) as caught:
        call()  # type: ignore[operator]
    return dict(caught.value.trailing_metadata())  # type: ignore[attr-defined]


def test_the_access_log_tells_who_called_what_and_what_came_of_it(
    channel: grpc.Channel,
    stub: service_pb2_grpc.GRPCInferenceServiceStub,
    tokens: dict[str, str],
    lines: list[logging.LogRecord],
) -> None:
    key, few = ([("authorization", f"Bearer {tokens[name]}")] for name in ("alice", "few"))
    answer = stub.ModelInfer(request(depth=3), metadata=[*key, ("x-request-id", "mine"), ("x-other", SECRET)])
    stub.ModelInfer(request(latency_budget_ms=60_000.0), metadata=few)
    stub.ModelMetadata(pb.ModelMetadataRequest(name="digits"), metadata=few)
    stub.ServerLive(pb.ServerLiveRequest())
    health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    refused(lambda: stub.ModelInfer(request("cats"), metadata=key))
    refused(lambda: stub.ModelInfer(request(), metadata=[("x-api-key", SECRET)]))
    refused(lambda: stub.ModelInfer(request(), metadata=few))
    refused(lambda: channel.unary_unary(f"/{SECRET}")(b"", metadata=key))
    assert told(lines, 9, "method", "route", "status", "model", "key", "depth", "stopped_by", "deadline_met") == [
        ("gRPC", f"{SERVICE}/ModelInfer", OK, "digits", "alice", 3, "depth", None),
        ("gRPC", f"{SERVICE}/ModelInfer", OK, "digits", "few", lines[1].depth, "complete", True),
        ("gRPC", f"{SERVICE}/ModelMetadata", OK, "digits", "few", None, None, None),
        ("gRPC", f"{SERVICE}/ServerLive", OK, None, None, None, None, None),
        ("gRPC", "/grpc.health.v1.Health/Check", OK, None, None, None, None, None),
        ("gRPC", f"{SERVICE}/ModelInfer", grpc.StatusCode.NOT_FOUND.value[0], "cats", "alice", None, None, None),
        ("gRPC", f"{SERVICE}/ModelInfer", grpc.StatusCode.UNAUTHENTICATED.value[0], None, None, None, None, None),
        ("gRPC", f"{SERVICE}/ModelInfer", grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], None, "few", None, None, None),
        ("gRPC", None, grpc.StatusCode.UNIMPLEMENTED.value[0], None, "alice", None, None, None),
    ]
    first = lines[0]
    assert (first.request_id, first.bytes_in, first.bytes_out) == ("mine", request(depth=3).ByteSize(), answer.ByteSize())
    assert first.duration_ms > 0
    assert len({line.request_id for line in lines}) == len(lines)
    for line in lines:
        written = json.dumps(vars(line), default=str)
        assert SECRET not in written
        assert not any(tokens[name] in written for name in ("alice", "few"))


def test_each_request_of_a_stream_has_a_line_and_then_the_stream(
    stub: service_pb2_grpc.GRPCInferenceServiceStub, tokens: dict[str, str], lines: list[logging.LogRecord]
) -> None:
    metadata = [("authorization", f"Bearer {tokens['alice']}"), ("x-request-id", "a-stream")]
    requests = [request(depth=2), request("cats"), request(depth=1)]
    answers = list(stub.ModelStreamInfer(iter(requests), metadata=metadata))
    missing = grpc.StatusCode.NOT_FOUND.value[0]
    assert told(lines, 4, "status", "model", "depth", "bytes_in", "bytes_out") == [
        (OK, "digits", 2, requests[0].ByteSize(), answers[0].ByteSize()),
        (missing, "cats", None, requests[1].ByteSize(), answers[1].ByteSize()),
        (OK, "digits", 1, requests[2].ByteSize(), answers[2].ByteSize()),
        (OK, None, None, None, None),
    ]
    everywhere = ("a-stream", "alice", f"{SERVICE}/ModelStreamInfer")
    assert set(told(lines, 4, "request_id", "key", "route")) == {everywhere}


def test_a_client_that_leaves_is_logged_as_one_that_left(
    stub: service_pb2_grpc.GRPCInferenceServiceStub, tokens: dict[str, str], lines: list[logging.LogRecord]
) -> None:
    done = threading.Event()

    def requests() -> Iterator[pb.ModelInferRequest]:
        yield request(depth=1)
        done.wait(60)

    stream = stub.ModelStreamInfer(requests(), metadata=[("authorization", f"Bearer {tokens['alice']}")])
    next(stream)
    assert told(lines, 1, "status") == [(OK,)]  # which is written after the client has its answer
    stream.cancel()
    try:  # the requests end later: that they did must not be told first
        assert told(lines, 2, "status", "model") == [(OK, "digits"), (CANCELLED, None)]
    finally:
        done.set()


def test_a_sane_request_id_comes_back_and_else_the_call_gets_one(
    stub: service_pb2_grpc.GRPCInferenceServiceStub, tokens: dict[str, str]
) -> None:
    key = [("authorization", f"Bearer {tokens['alice']}")]

    def id_of(given: str | None, metadata: list[tuple[str, str]]) -> str:
        sent = [*metadata, *([("x-request-id", given)] if given is not None else [])]
        try:
            _, call = stub.ModelInfer.with_call(request(depth=1), metadata=sent)
        except grpc.RpcError as error:
            call = error
        (own,) = (value for name, value in call.trailing_metadata() if name == "x-request-id")
        return own

    for metadata in (key, []):  # answered and refused
        assert id_of("abc-123", metadata) == "abc-123"
        for given in (None, "two words", "x" * 129):
            made = id_of(given, metadata)
            assert len(made) == 32
            assert int(made, 16) >= 0
