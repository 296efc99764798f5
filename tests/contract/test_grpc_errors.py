"""Malformed requests over gRPC: always a status, a code and a sentence that says what was expected, and the server serves
on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from service.gate import AT_ONCE
from service.oip.rpc.answering import Arrival
from tests.contract.conftest import Client, left_to_the_collector

INFER = "/inference.GRPCInferenceService/ModelInfer"
INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
UNKNOWN_CALL = grpc.StatusCode.UNIMPLEMENTED
PIXELS = np.full(784, 0.5, np.float32)
NAN, INFINITE = (np.where(np.arange(784) == 7, value, PIXELS).astype(np.float32) for value in (np.nan, np.inf))


@dataclass(frozen=True)
class Case:
    message: bytes
    sentence: str
    status: grpc.StatusCode = INVALID
    code: str | None = "bad_request"
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    method: str = INFER


def good(pixels: np.ndarray = PIXELS, *, raw: bool = True) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="digits")
    tensor = message.inputs.add(name="x", datatype="FP32", shape=[1, 28, 28])
    if raw:
        message.raw_input_contents.append(pixels.tobytes())
    else:
        tensor.contents.fp32_contents.extend(pixels.tolist())
    return message


GOOD = good().SerializeToString()


def case(
    change: Callable[[pb.ModelInferRequest], object],
    sentence: str,
    status: grpc.StatusCode = INVALID,
    code: str = "bad_request",
    *,
    raw: bool = True,
) -> Case:
    """A request that is good but for a change."""
    message = good(raw=raw)
    change(message)
    return Case(message.SerializeToString(), sentence, status, code)


def tensor(sentence: str, *, raw: bool = True, **members: object) -> Case:
    """One input that is wrong."""

    def change(message: pb.ModelInferRequest) -> None:
        for name, value in members.items():
            if name == "shape":
                message.inputs[0].shape[:] = value  # type: ignore[index]
            else:
                setattr(message.inputs[0], name, value)

    return case(change, sentence, raw=raw)


def contents(sentence: str, datatype: str = "FP32", **fields: list[object]) -> Case:
    """Typed values that are wrong."""

    def change(message: pb.ModelInferRequest) -> None:
        message.inputs[0].datatype = datatype
        message.inputs[0].ClearField("contents")
        for name, values in fields.items():
            getattr(message.inputs[0].contents, name).extend(values)

    return case(change, sentence, raw=False)


def parameter(sentence: str, name: str, code: str = "invalid_input", **value: object) -> Case:
    """A parameter that is wrong."""
    return case(lambda message: message.parameters[name].MergeFrom(pb.InferParameter(**value)), sentence, code=code)


def outputs(sentence: str, *names: str, **parameters: object) -> Case:
    """Outputs that are wrong; the parameters are the first one's."""

    def change(message: pb.ModelInferRequest) -> None:
        for name in names:
            message.outputs.add(name=name)
        for name, value in parameters.items():
            message.outputs[0].parameters[name].MergeFrom(value)

    return case(change, sentence)


def metadata(sentence: str, *pairs: tuple[str, str | bytes]) -> Case:
    return Case(GOOD, sentence, INVALID, "invalid_input", pairs)


def unloading(**parameters: pb.ModelRepositoryParameter) -> pb.RepositoryModelUnloadRequest:
    return pb.RepositoryModelUnloadRequest(model_name="digits", parameters=parameters)


def other(
    method: str, message: object, sentence: str, status: grpc.StatusCode = MISSING, code: str | None = "unknown_model"
) -> Case:
    """Another RPC."""
    content = message if isinstance(message, bytes) else message.SerializeToString()  # type: ignore[attr-defined]
    return Case(content, sentence, status, code, method=f"/inference.GRPCInferenceService/{method}")


def add_input(message: pb.ModelInferRequest, name: str) -> None:
    message.inputs.add(name=name, datatype="FP32", shape=[1, 28, 28])
    message.raw_input_contents.append(PIXELS.tobytes())


CASES: dict[str, Case] = {
    # What is no message
    "no protobuf": Case(b"\xff" * 40, "expected a inference.ModelInferRequest", code="malformed_input"),
    "half a message": Case(GOOD[:-10], "expected a inference.ModelInferRequest", code="malformed_input"),
    "JSON": Case(b'{"inputs": []}', "expected a inference.ModelInferRequest", code="malformed_input"),
    "a name that is no utf-8": Case(b"\x0a\x01\xff", "expected a inference.ModelInferRequest", code="malformed_input"),
    # Models
    "empty message": Case(b"", "no model '' is served here", MISSING, "unknown_model"),
    "unknown model": case(lambda m: setattr(m, "model_name", "cats"), "no model 'cats'", MISSING, "unknown_model"),
    "path as model": case(lambda m: setattr(m, "model_name", "../../etc"), "no model", MISSING, "unknown_model"),
    "long model": case(lambda m: setattr(m, "model_name", "y" * 100_000), "no model", MISSING, "unknown_model"),
    "unknown version": case(lambda m: setattr(m, "model_version", "2"), "version '2' of", MISSING, "unknown_version"),
    "version no number": case(lambda m: setattr(m, "model_version", "new"), "version 'new'", MISSING, "unknown_version"),
    # Inputs
    "many inputs": Case(
        pb.ModelInferRequest(model_name="digits").SerializeToString() + b"\x2a\x00" * 10_000,
        "inputs: expected at most 100, got 10000",
    ),
    "many outputs": Case(GOOD + b"\x32\x00" * 10_000, "outputs: expected at most 100, got 10000"),
    "too many parameters": case(
        lambda m: [m.parameters[str(number)].CopyFrom(pb.InferParameter(bool_param=True)) for number in range(101)],
        "parameters: expected at most 100 parameters, got 101",
    ),
    "no input": case(lambda m: m.ClearField("inputs"), "expected the one input 'x', got none"),
    "nothing at all but a model": Case(
        pb.ModelInferRequest(model_name="digits").SerializeToString(), "expected the one input 'x', got none"
    ),
    "another name": tensor("expected the one input 'x', got 'y'", name="y"),
    "name in capitals": tensor("expected the one input 'x', got 'X'", name="X"),
    "long name": tensor("expected the one input 'x', got 'yyyy", name="y" * 100_000),
    "the input twice": case(lambda m: add_input(m, "x"), "expected the one input 'x', got 'x', 'x'"),
    "an input too many": case(lambda m: add_input(m, "y"), "expected the one input 'x', got 'x', 'y'"),
    "datatype of numpy": tensor("expected datatype FP32, got 'float32'", datatype="float32"),
    "no datatype": tensor("expected datatype FP32, got ''", datatype=""),
    "bytes": tensor("expected datatype FP32, got 'BYTES'", datatype="BYTES"),
    "booleans": tensor("expected datatype FP32, got 'BOOL'", datatype="BOOL"),
    "bfloat16": tensor("expected datatype FP32, got 'BF16'", datatype="BF16"),
    "no shape": tensor("expected shape [-1, 28, 28], got []", shape=[]),
    "flat": tensor("expected shape [-1, 28, 28], got [1, 784]", shape=[1, 784]),
    "transposed": tensor("expected shape [-1, 28, 28], got [28, 28, 1]", shape=[28, 28, 1]),
    "an axis too many": tensor("expected shape [-1, 28, 28], got [1, 1, 28, 28]", shape=[1, 1, 28, 28]),
    "a hundred thousand axes": tensor("expected shape [-1, 28, 28], got [1, 1", shape=[1] * 100_000),
    "no rows": tensor("expected 1 to 40 rows, got 0", shape=[0, 28, 28]),
    "negative rows": tensor("expected 1 to 40 rows, got -1", shape=[-1, 28, 28]),
    "rows beyond the limit": tensor("expected 1 to 40 rows, got 41", shape=[41, 28, 28]),
    "2^62 rows": tensor("expected 1 to 40 rows, got 46116860", shape=[2**62, 28, 28]),
    "two rows told, one sent": tensor("of 6272 bytes for FP32 of shape [2, 28, 28], got 3136", shape=[2, 28, 28]),
    "shared memory": case(
        lambda m: (
            m.ClearField("raw_input_contents"),
            m.inputs[0].parameters["shared_memory_region"].MergeFrom(pb.InferParameter(string_param="a")),
        ),
        "shared_memory_region is not served",
    ),
    "an input's parameter without a value": case(
        lambda m: m.inputs[0].parameters["a"].MergeFrom(pb.InferParameter()), "expected 'a' to have a string, number"
    ),
    # Raw values
    "a byte too few": case(
        lambda m: m.raw_input_contents.__setitem__(0, bytes(3135)), "raw_input_contents of 3136 bytes for FP32"
    ),
    "a byte too many": case(lambda m: m.raw_input_contents.__setitem__(0, bytes(3137)), "of 3136 bytes for FP32"),
    "empty raw values": case(lambda m: m.raw_input_contents.__setitem__(0, b""), "[1, 28, 28], got 0"),
    "raw values of another datatype": tensor("6272 bytes for FP64 of shape [1, 28, 28], got 3136", datatype="FP64"),
    "raw values twice": case(
        lambda m: m.raw_input_contents.append(PIXELS.tobytes()), "one for each input, which is 1, got 2"
    ),
    "raw values and typed ones": case(
        lambda m: m.inputs[0].contents.fp32_contents.extend(PIXELS.tolist()), "either contents or raw_input_contents"
    ),
    "raw NaN": case(lambda m: m.raw_input_contents.__setitem__(0, NAN.tobytes()), "NaN", code="invalid_input"),
    "raw infinity": case(lambda m: m.raw_input_contents.__setitem__(0, INFINITE.tobytes()), "x", code="invalid_input"),
    "raw pixels out of range": case(
        lambda m: m.raw_input_contents.__setitem__(0, (300 * PIXELS).tobytes()), "x", code="invalid_input"
    ),
    # Typed values
    "neither raw values nor typed ones": case(
        lambda m: m.ClearField("raw_input_contents"), "expected 784 values for shape [1, 28, 28], got 0"
    ),
    "a value too few": contents("expected 784 values for shape [1, 28, 28], got 783", fp32_contents=[0.5] * 783),
    "a value too many": contents("expected 784 values for shape [1, 28, 28], got 785", fp32_contents=[0.5] * 785),
    "doubles as floats": contents("expected FP32 in fp32_contents, got fp64_contents", fp64_contents=[0.5] * 784),
    "floats and doubles": contents(
        "expected FP32 in fp32_contents, got fp64_contents", fp32_contents=[0.5] * 784, fp64_contents=[0.5]
    ),
    "integers as floats": contents("expected FP32 in fp32_contents, got int_contents", int_contents=[1] * 784),
    "strings": contents("expected FP32 in fp32_contents, got bytes_contents", bytes_contents=[b"0"] * 784),
    "typed halves": contents("expected FP16 in raw_input_contents", "FP16", fp32_contents=[0.5] * 784),
    "300 as 8 bits": contents("expected UINT8 values, got others among them", "UINT8", uint_contents=[300] * 784),
    "-200 as 8 bits": contents("expected INT8 values, got others among them", "INT8", int_contents=[-200] * 784),
    # Outputs
    "unknown output": outputs("expected some of probabilities, logits", "classes"),
    "an output without a name": outputs("expected some of probabilities, logits", ""),
    "an output twice": outputs("expected each once, got 'label' several times", "label", "label"),
    "classification": outputs("classification is not served", "label", classification=pb.InferParameter(int64_param=3)),
    "an output in shared memory": outputs(
        "shared_memory_region is not served", "label", shared_memory_region=pb.InferParameter(string_param="a")
    ),
    "binary_data a number": outputs(
        "expected binary_data to be a boolean", "label", binary_data=pb.InferParameter(int64_param=1)
    ),
    "outputs of both kinds": outputs(
        "expected binary_data to be the same for all", "label", "depth", binary_data=pb.InferParameter(bool_param=False)
    ),
    # Wishes
    "unknown parameter": parameter("parameters: expected some of depth", "detph", "bad_request", int64_param=2),
    "a parameter without a value": parameter("expected 'depth' to have a string, number", "depth", "bad_request"),
    "rungs outside of a stream": parameter("parameters: expected some of", "rungs", "bad_request", bool_param=True),
    "depth 0": parameter("depth", "depth", int64_param=0),
    "depth 2^64 - 1": parameter("depth", "depth", "not_offered", uint64_param=2**64 - 1),
    "depth a fraction": parameter("depth", "depth", double_param=2.5),
    "depth a word": parameter("depth", "depth", string_param="deep"),
    "depth a boolean": parameter("depth", "depth", bool_param=True),
    "depth not offered": parameter("depth 9 is not offered", "depth", "not_offered", int64_param=9),
    "path no path": parameter("path", "path", string_param="4-7"),
    "path a number": parameter("path: Input should be a valid string", "path", int64_param=4),
    "budget 0": parameter("latency_budget_ms: Input should be greater than 0", "latency_budget_ms", double_param=0.0),
    "budget NaN": parameter("latency_budget_ms", "latency_budget_ms", double_param=float("nan")),
    "budget a string": parameter("latency_budget_ms", "latency_budget_ms", string_param="5"),
    "confidence above 1": parameter("min_confidence", "min_confidence", double_param=1.5),
    "risk not certified": parameter("max_risk 0.123 is not certified", "max_risk", "not_offered", double_param=0.123),
    "strict a number": parameter("strict: Input should be a valid boolean", "strict", int64_param=1),
    "timeout negative": parameter("timeout", "timeout", int64_param=-1),
    "priority a string": parameter("priority", "priority", string_param="high"),
    "two wishes": case(
        lambda m: (
            m.parameters["depth"].MergeFrom(pb.InferParameter(int64_param=1)),
            m.parameters["path"].MergeFrom(pb.InferParameter(string_param="4")),
        ),
        "give only one of depth, path",
        code="invalid_input",
    ),
    "a wish in metadata that is no number": metadata(
        "X-Latency-Budget-Ms: expected a number", ("x-latency-budget-ms", "x")
    ),
    "a wish in metadata twice": metadata("X-Depth: expected one, got several", ("x-depth", "1"), ("x-depth", "2")),
    "two wishes in metadata": metadata("give only one of depth", ("x-depth", "1"), ("x-path", "4")),
    # Other calls
    "metadata of an unknown model": other("ModelMetadata", pb.ModelMetadataRequest(name="cats"), "no model 'cats'"),
    "configuration of an unknown model": other("ModelConfig", pb.ModelConfigRequest(name="cats"), "no model 'cats'"),
    "readiness of an unknown model": other("ModelReady", pb.ModelReadyRequest(name="cats"), "no model 'cats'"),
    "statistics of an unknown model": other("ModelStatistics", pb.ModelStatisticsRequest(name="cats"), "no model 'cats'"),
    "metadata of an unknown version": other(
        "ModelMetadata", pb.ModelMetadataRequest(name="digits", version="9"), "version '9'", MISSING, "unknown_version"
    ),
    "metadata asked by no message": other(
        "ModelMetadata", b"\xff", "expected a inference.Model", INVALID, "malformed_input"
    ),
    "unloading an unknown model": other(
        "RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="cats"), "no model 'cats'"
    ),
    "unloading with a parameter": other(
        "RepositoryModelUnload",
        unloading(force=pb.ModelRepositoryParameter(bool_param=True)),
        "got 'force'",
        INVALID,
        "bad_request",
    ),
    "unloading dependents by a word": other(
        "RepositoryModelUnload",
        unloading(unload_dependents=pb.ModelRepositoryParameter(string_param="yes")),
        "expected unload_dependents, a boolean",
        INVALID,
        "bad_request",
    ),
    "no such call": other("ModelExplain", b"", "there is no such call here", UNKNOWN_CALL, "not_supported"),
    "no such service": Case(b"", "there is no such call here", UNKNOWN_CALL, "not_supported", method="/inference.Other/A"),
    # By the library, before there is a message
    "too long": Case(bytes(400_001), "message larger than max", grpc.StatusCode.RESOURCE_EXHAUSTED, None),
}


def refused(channel: grpc.Channel, wrong: Case, compression: grpc.Compression | None = None) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(wrong.method)(wrong.message, metadata=wrong.metadata, compression=compression, timeout=60)
    error = caught.value
    assert error.code() == wrong.status, error.details()
    assert wrong.sentence in error.details()
    assert len(error.details()) < 600
    assert dict(error.trailing_metadata()).get("code") == wrong.code


@pytest.fixture(scope="module")
def channel(client: Client) -> grpc.Channel:
    with grpc.insecure_channel(client.rpc) as channel:
        yield channel


@pytest.mark.parametrize("name", CASES)
def test_malformed_requests_are_refused_and_the_server_serves_on(channel: grpc.Channel, name: str) -> None:
    refused(channel, CASES[name])
    assert pb.ModelInferResponse.FromString(channel.unary_unary(INFER)(GOOD)).model_name == "digits"


def test_what_was_refused_is_let_go(channel: grpc.Channel) -> None:
    with left_to_the_collector() as left:
        for wrong in CASES.values():
            refused(channel, wrong)
    assert not left


def test_a_refusal_is_a_status_and_nothing_before_it(channel: grpc.Channel) -> None:
    """Else clients, which try again what was refused, would take the call for one that has begun to be answered."""
    wrong = CASES["unknown model"]
    messages = []
    with pytest.raises(grpc.RpcError) as caught:
        messages += channel.unary_stream(wrong.method)(wrong.message, timeout=60)
    assert (caught.value.code(), messages) == (wrong.status, [])


def test_in_a_crowd_who_is_late_is_refused_unread(channel: grpc.Channel, client: Client) -> None:
    calls = client.app.state.context.call_gate
    message = good()
    message.parameters["latency_budget_ms"].double_param = 0.001
    for _ in range(AT_ONCE):
        client.run(calls.enter(0.0, lambda: None))
    try:
        with pytest.raises(grpc.RpcError, match="for the server to read it") as caught:
            channel.unary_unary(INFER)(message.SerializeToString(), timeout=60)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert channel.unary_unary(INFER)(GOOD, timeout=60)
    finally:
        for _ in range(AT_ONCE):
            calls.leave()


def test_however_long_a_call_waited_unseen_its_client_waits_as_long_as_it_said() -> None:
    crowd = SimpleNamespace(call_gate=SimpleNamespace(came_s=lambda now_s: now_s - 5))
    for left_s, patience_s in ((1.0, 6.0), (None, None)):
        call = SimpleNamespace(invocation_metadata=tuple, time_remaining=lambda left_s=left_s: left_s)
        assert Arrival.now(crowd, INFER, call).patience_s == pytest.approx(patience_s)


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_requests_are_read_and_bounded_once_decompressed(
    channel: grpc.Channel, compression: grpc.Compression
) -> None:
    assert (
        pb.ModelInferResponse.FromString(channel.unary_unary(INFER)(GOOD, compression=compression)).model_name == "digits"
    )
    bomb = Case(bytes(20_000_000), "larger than max", grpc.StatusCode.RESOURCE_EXHAUSTED, None)
    refused(channel, bomb, compression)
