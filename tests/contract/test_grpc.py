"""The Open Inference Protocol over gRPC: what is answered is what REST answers; what gRPC has of its own."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from service.app import create_app
from service.repository import Repository
from service.settings import Settings
from tests.conftest import Trained
from tests.contract.conftest import Client
from tests.contract.test_oip import OUTPUTS, in_json, post, post_binary
from tests.fakes import fake_model
from training.dataset import Dataset

FIELDS = {"FP32": "fp32_contents", "INT64": "int64_contents", "BYTES": "bytes_contents"}
WISHES: dict[str, dict[str, object]] = {
    "none": {},
    "depth": {"depth": 2},
    "best": {"depth": "best"},
    "path": {"path": "4-6-7"},
    "confidence": {"min_confidence": 0.4},
    "risk": {"max_risk": "greatest certified"},
    "budget": {"latency_budget_ms": 60_000.0, "strict": True},
    "whole number as budget": {"latency_budget_ms": 60_000},
    "timeout": {"timeout": 60_000_000, "priority": 2},
}


@pytest.fixture(scope="module")
def images(digits: Dataset) -> np.ndarray:
    return digits.test.x[:4].numpy()


@pytest.fixture(scope="module")
def channel(client: Client) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(client.rpc) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> service_pb2_grpc.GRPCInferenceServiceStub:
    return service_pb2_grpc.GRPCInferenceServiceStub(channel)


def set_parameters(where: dict[str, pb.InferParameter], values: dict[str, object]) -> None:
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    for name, value in values.items():
        setattr(where[name], kinds[type(value)], value)


def request(
    images: np.ndarray,
    wishes: dict[str, object] | None = None,
    outputs: tuple[str, ...] = (),
    *,
    raw: bool = True,
    id_: str = "",
) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="digits", id=id_)
    tensor = message.inputs.add(name="x", datatype="FP32", shape=images.shape)
    if raw:
        message.raw_input_contents.append(images.tobytes())
    else:
        tensor.contents.fp32_contents.extend(images.ravel().tolist())
    set_parameters(message.parameters, wishes or {})
    for name in outputs:
        message.outputs.add(name=name)
    return message


def parts(response: object) -> dict[str, bytes]:
    """The binary outputs of a REST answer, by name."""
    length = int(response.headers["inference-header-content-length"])  # type: ignore[attr-defined]
    header, rest = json.loads(response.content[:length]), response.content[length:]  # type: ignore[attr-defined]
    found = {}
    for output in header["outputs"]:
        size = output["parameters"]["binary_data_size"]
        found[output["name"]], rest = rest[:size], rest[size:]
    assert not rest
    return found


def refusal(call: object) -> tuple[grpc.StatusCode, str, str, dict[str, object]]:
    """Status, code, sentence and details of a call that fails."""
    with pytest.raises(grpc.RpcError) as caught:
        call()  # type: ignore[operator]
    error = caught.value
    metadata = dict(error.trailing_metadata())  # type: ignore[attr-defined]
    details = json.loads(metadata.get("details", "{}"))
    return error.code(), metadata.get("code", ""), error.details(), details  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", WISHES)
def test_binary_outputs_are_those_of_rest_byte_for_byte(
    client: Client, stub: service_pb2_grpc.GRPCInferenceServiceStub, images: np.ndarray, trained: Trained, name: str
) -> None:
    wishes = WISHES[name]
    if "max_risk" in wishes:
        assert trained.manifest.certificate is not None
        wishes = {"max_risk": trained.manifest.certificate.levels[-1].epsilon}
    rest = post_binary(client, images, parameters={**wishes, "binary_data_output": True}, id="42")
    assert rest.status_code == 200, rest.text
    answer = stub.ModelInfer(request(images, wishes, id_="42"))
    header = json.loads(rest.content[: int(rest.headers["inference-header-content-length"])])
    assert (answer.model_name, answer.model_version, answer.id) == (header["model_name"], header["model_version"], "42")
    told = [(each["name"], each["datatype"], each["shape"]) for each in header["outputs"]]
    assert [(each.name, each.datatype, list(each.shape)) for each in answer.outputs] == told
    assert dict(zip(OUTPUTS, answer.raw_output_contents, strict=True)) == parts(rest)
    assert answer.parameters.keys() == header["parameters"].keys()
    assert answer.parameters["depth"].int64_param == header["parameters"]["depth"]
    for flag in ("deadline_met", "certified"):
        assert answer.parameters[flag].bool_param == header["parameters"].get(flag, False)


@pytest.mark.parametrize("output", OUTPUTS)
def test_typed_outputs_are_those_of_rest(
    client: Client, stub: service_pb2_grpc.GRPCInferenceServiceStub, images: np.ndarray, output: str
) -> None:
    rest = post(client, in_json(images, parameters={"depth": 3}, outputs=[{"name": output}])).json()
    answer = stub.ModelInfer(request(images, {"depth": 3}, (output,), raw=False))
    assert not answer.raw_output_contents
    (tensor,) = answer.outputs
    (expected,) = rest["outputs"]
    assert (tensor.name, tensor.datatype, list(tensor.shape)) == (output, expected["datatype"], expected["shape"])
    values = list(getattr(tensor.contents, FIELDS[tensor.datatype]))
    assert [value.decode() if isinstance(value, bytes) else value for value in values] == expected["data"]


@pytest.mark.parametrize(
    ("datatype", "field", "dtype"),
    [
        ("FP32", "fp32_contents", "<f4"),
        ("FP64", "fp64_contents", "<f8"),
        ("INT8", "int_contents", "i1"),
        ("INT16", "int_contents", "<i2"),
        ("INT32", "int_contents", "<i4"),
        ("INT64", "int64_contents", "<i8"),
        ("UINT8", "uint_contents", "u1"),
        ("UINT16", "uint_contents", "<u2"),
        ("UINT32", "uint_contents", "<u4"),
        ("UINT64", "uint64_contents", "<u8"),
        ("FP16", None, "<f2"),
    ],
)
def test_every_datatype_of_numbers_is_read_typed_and_raw(
    stub: service_pb2_grpc.GRPCInferenceServiceStub, images: np.ndarray, datatype: str, field: str | None, dtype: str
) -> None:
    whole = np.round(images).astype(dtype)
    expected = stub.ModelInfer(request(whole.astype(np.float32), {"depth": 2}, ("logits",))).raw_output_contents[0]
    raw = request(images, {"depth": 2}, ("logits",))
    raw.inputs[0].datatype, raw.raw_input_contents[0] = datatype, whole.tobytes()
    assert stub.ModelInfer(raw).raw_output_contents[0] == expected
    if field is not None:
        typed = request(images, {"depth": 2}, ("logits",), raw=False)
        typed.inputs[0].datatype = datatype
        typed.inputs[0].ClearField("contents")
        getattr(typed.inputs[0].contents, field).extend(whole.ravel().tolist())
        values = stub.ModelInfer(typed).outputs[0].contents.fp32_contents
        assert np.array(values, np.float32).tobytes() == expected


def test_a_request_can_ask_for_the_other_kind_of_answer(
    stub: service_pb2_grpc.GRPCInferenceServiceStub, images: np.ndarray
) -> None:
    typed = stub.ModelInfer(request(images, {"depth": 2, "binary_data_output": False}))
    raw = stub.ModelInfer(request(images, {"depth": 2, "binary_data_output": True}, raw=False))
    assert not typed.raw_output_contents
    assert np.array(typed.outputs[0].contents.fp32_contents, np.float32).tobytes() == raw.raw_output_contents[0]
    message = request(images, {"depth": 2}, ("label", "depth"))
    for output in message.outputs:
        output.parameters["binary_data"].bool_param = False
    assert not stub.ModelInfer(message).raw_output_contents


def test_wishes_come_as_metadata_too_and_the_request_wins(
    stub: service_pb2_grpc.GRPCInferenceServiceStub, images: np.ndarray
) -> None:
    answer = stub.ModelInfer(request(images), metadata=[("x-depth", "3"), ("x-latency-budget-ms", "60000")])
    assert answer.parameters["depth"].int64_param == 3
    assert answer.parameters["deadline_met"].bool_param
    answer = stub.ModelInfer(request(images, {"depth": 1}), metadata=[("x-depth", "3")])
    assert answer.parameters["depth"].int64_param == 1


def test_the_deadline_of_a_call_is_a_budget_and_the_smaller_counts(
    stub: service_pb2_grpc.GRPCInferenceServiceStub, images: np.ndarray
) -> None:
    assert "deadline_met" not in stub.ModelInfer(request(images, {"depth": 2})).parameters
    assert stub.ModelInfer(request(images, {"depth": 2}), timeout=60).parameters["deadline_met"].bool_param
    small = {"latency_budget_ms": 0.001, "strict": True}
    status, code, sentence, details = refusal(lambda: stub.ModelInfer(request(images, small), timeout=60))
    assert (status, code) == (grpc.StatusCode.DEADLINE_EXCEEDED, "deadline_infeasible")
    assert "a budget of 0.001 ms cannot be met now" in sentence
    assert details["smallest_feasible_budget_ms"] > 0.001
    large = {"latency_budget_ms": 1e9, "strict": True}
    answer = stub.ModelInfer(request(images, large), timeout=60)
    assert answer.parameters["deadline_met"].bool_param


def test_errors_have_a_status_a_code_and_details(
    client: Client, stub: service_pb2_grpc.GRPCInferenceServiceStub, images: np.ndarray
) -> None:
    rest = post(client, in_json(images, parameters={"depth": 9})).json()
    status, code, sentence, details = refusal(lambda: stub.ModelInfer(request(images, {"depth": 9})))
    assert (status, code, sentence) == (grpc.StatusCode.INVALID_ARGUMENT, rest.pop("code"), rest.pop("error"))
    assert details == rest
    before = refusals(client, "unknown_version")
    unknown = request(images)
    unknown.model_version = "7"
    status, code, _, details = refusal(lambda: stub.ModelInfer(unknown))
    assert (status, code, details) == (grpc.StatusCode.NOT_FOUND, "unknown_version", {"versions": ["1"]})
    assert refusals(client, "unknown_version") == before + 1


def refusals(client: Client, code: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f'hbll_refusals_total{{code="{code}"}}'))


def test_what_is_told_is_what_rest_tells(client: Client) -> None:
    with triton.InferenceServerClient(client.rpc) as told:
        metadata = told.get_server_metadata(as_json=True)
        assert metadata == client.get("/v2").json()
        model = client.get("/v2/models/digits").json()
        for tensor in (*model["inputs"], *model["outputs"]):
            tensor["shape"] = list(map(str, tensor["shape"]))  # 64 bits, which JSON has as text
        assert told.get_model_metadata("digits", as_json=True) == model
        config, expected = told.get_model_config("digits").config, client.get("/v2/models/digits/config").json()
        assert (config.name, config.backend, config.platform) == ("digits", "onnxruntime", expected["platform"])
        assert config.max_batch_size == expected["max_batch_size"] == 40
        assert config.HasField("dynamic_batching")
        assert [tuple(each.dims) for each in config.output] == [tuple(each["dims"]) for each in expected["output"]]
        assert [each.HasField("reshape") for each in config.output] == ["reshape" in each for each in expected["output"]]
        statistics = told.get_inference_statistics()
        assert statistics == told.get_inference_statistics("digits")
        (mine,) = statistics.model_stats
        (theirs,) = client.get("/v2/models/stats").json()["model_stats"]
        assert mine.inference_count == theirs["inference_count"] > 0
        assert mine.inference_stats.success.ns == theirs["inference_stats"]["success"]["ns"]
        (entry,) = told.get_model_repository_index().models
        assert {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason} == (
            client.request("POST", "/v2/repository/index").json()[0]
        )


def test_models_are_loaded(stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
    assert stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="digits")) == pb.RepositoryModelLoadResponse()
    wrong = pb.RepositoryModelLoadRequest(model_name="digits")
    wrong.parameters["config"].string_param = "{}"
    assert refusal(lambda: stub.RepositoryModelLoad(wrong))[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "bad_request")
    unknown = pb.RepositoryModelLoadRequest(model_name="cats")
    assert refusal(lambda: stub.RepositoryModelLoad(unknown))[:2] == (grpc.StatusCode.NOT_FOUND, "unknown_model")
    status, *_ = refusal(lambda: stub.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest()))
    assert status == grpc.StatusCode.UNIMPLEMENTED


def test_an_unloaded_model_is_not_there_until_it_is_loaded(
    stub: service_pb2_grpc.GRPCInferenceServiceStub, images: np.ndarray
) -> None:
    def ready() -> bool:
        return stub.ModelReady(pb.ModelReadyRequest(name="digits")).ready

    unload = pb.RepositoryModelUnloadRequest(model_name="digits")
    unload.parameters["unload_dependents"].bool_param = False
    before = stub.ModelInfer(request(images, {"depth": 2}))
    try:
        for _ in range(2):  # again: nothing happens
            assert stub.RepositoryModelUnload(unload) == pb.RepositoryModelUnloadResponse()
        assert not ready()
        assert stub.ServerReady(pb.ServerReadyRequest()).ready
        for ask in (
            lambda: stub.ModelInfer(request(images)),
            lambda: stub.ModelMetadata(pb.ModelMetadataRequest(name="digits")),
            lambda: stub.ModelStatistics(pb.ModelStatisticsRequest(name="digits")),
        ):
            status, code, sentence, _ = refusal(ask)
            assert (status, code) == (grpc.StatusCode.NOT_FOUND, "unknown_model")
            assert "digits was unloaded: an operator's `load` serves it again" in sentence
        (entry,) = stub.RepositoryIndex(pb.RepositoryIndexRequest()).models
        assert (entry.name, entry.version, entry.state, entry.reason) == ("digits", "1", "UNAVAILABLE", "unloaded")
        assert not stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True)).models
    finally:
        stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="digits"))
    assert ready()
    assert stub.ModelInfer(request(images, {"depth": 2})).raw_output_contents == before.raw_output_contents


def test_health_is_told_as_grpc_tells_it(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    for service in ("", "inference.GRPCInferenceService"):
        assert health.Check(health_pb2.HealthCheckRequest(service=service)).status == serving
    status, code, _, _ = refusal(lambda: health.Check(health_pb2.HealthCheckRequest(service="cats")))
    assert (status, code) == (grpc.StatusCode.NOT_FOUND, "unknown_service")


def test_a_server_that_is_not_warm_says_so() -> None:
    """Its model never becomes warm, for its runner fails."""
    model = fake_model()
    model.runner.error = RuntimeError("no device")
    app = create_app(Settings(grpc_port=0), Repository([model]))
    with Cold(app) as client, grpc.insecure_channel(client.rpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ServerLive(pb.ServerLiveRequest()).live
        assert not stub.ServerReady(pb.ServerReadyRequest()).ready
        assert not stub.ModelReady(pb.ModelReadyRequest(name="fake")).ready
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
        message = pb.ModelInferRequest(model_name="fake", raw_input_contents=[bytes(16)])
        message.inputs.add(name="x", datatype="FP32", shape=[1, 2, 2])
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(message)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        metadata = dict(caught.value.trailing_metadata())
        assert (metadata["code"], metadata["retry-after"]) == ("not_ready", "1")


class Cold(Client):
    """A client that does not wait until the app is ready."""

    async def _start(self) -> None:
        await self._lifespan.__aenter__()


def ask_stream(client: Client, requests: list[dict[str, object]]) -> list[tuple[pb.ModelInferResponse | None, str]]:
    """What tritonclient's stream calls back: the response, or the sentence of an error."""
    found: queue.Queue[tuple[object, object]] = queue.Queue()
    with triton.InferenceServerClient(client.rpc) as asking:
        asking.start_stream(lambda result, error: found.put((result, error)))
        for options in requests:
            images = options.pop("images")
            tensor = triton.InferInput("x", list(images.shape), "FP32").set_data_from_numpy(images)  # type: ignore[attr-defined]
            asking.async_stream_infer(inputs=[tensor], **options)
        asking.stop_stream()  # waits for the answers
    answers = []
    while not found.empty():
        result, error = found.get()
        answers.append((result and result.get_response(), str(error or "")))  # type: ignore[attr-defined]
    return answers


def test_a_stream_answers_each_request_in_its_turn_and_outlives_those_that_fail(
    client: Client, stub: service_pb2_grpc.GRPCInferenceServiceStub, images: np.ndarray
) -> None:
    answers = ask_stream(
        client,
        [
            {"model_name": "digits", "images": images, "parameters": {"depth": 2}, "request_id": "a"},
            {"model_name": "cats", "images": images, "request_id": "b"},
            {"model_name": "digits", "images": images, "parameters": {"rungs": 1}, "request_id": "c"},
            {"model_name": "digits", "images": images, "parameters": {"depth": 9}, "request_id": "d"},
            {"model_name": "digits", "images": images[:1], "parameters": {"depth": 3}, "request_id": "e"},
        ],
    )
    assert [error for _, error in answers] == [
        "",
        "no model 'cats' is served here: expected one of digits",
        "parameters: expected rungs to be a boolean",
        refusal(lambda: stub.ModelInfer(request(images, {"depth": 9})))[2],
        "",
    ]
    first, last = answers[0][0], answers[-1][0]
    assert first is not None
    assert last is not None
    assert (first.id, last.id) == ("a", "e")
    assert first.parameters["triton_final_response"].bool_param
    assert first.raw_output_contents == stub.ModelInfer(request(images, {"depth": 2})).raw_output_contents


def test_a_stream_answers_rung_by_rung_where_it_is_asked_to(client: Client, images: np.ndarray) -> None:
    climb = client.get("/v1/models/digits").json()["climb"]
    asked = {"model_name": "digits", "images": images[:1], "enable_empty_final_response": True}
    answers = [answer for answer, _ in ask_stream(client, [asked | {"parameters": {"rungs": True}}])]
    paths = []
    for answer in answers:
        assert answer is not None
        paths.append(triton.InferResult(answer).as_numpy("path")[0].decode())
    assert paths == climb
    finals = [answer.parameters["triton_final_response"].bool_param for answer in answers]  # type: ignore[union-attr]
    assert finals == [False] * (len(climb) - 1) + [True]
    ((_, error),) = ask_stream(client, [asked | {"images": images, "parameters": {"rungs": True}}])
    assert error == "rungs: expected one row, got 4"
    ((one, _),) = ask_stream(client, [asked | {"parameters": {"rungs": False}}])
    assert one is not None
    assert one.raw_output_contents == answers[-1].raw_output_contents  # type: ignore[union-attr]
