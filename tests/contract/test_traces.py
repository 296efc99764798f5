"""Requests as traces: a server span, its wait and its segments as children."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from service.app import create_app
from service.settings import Settings
from service.tracing import Tracer
from tests.conftest import Trained
from tests.contract.conftest import Client

IMAGE = [[0.5] * 28] * 28
RAW = b"\0" * 4 * 784


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def traced(trained: Trained, exporter: InMemorySpanExporter) -> Iterator[Client]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.app.open_tracer", lambda: Tracer(provider))
        with Client(create_app(Settings(models=trained.models, grpc_port=0))) as client:
            yield client


TENSOR = {"name": "x", "shape": [1, 28, 28], "datatype": "FP32", "data": [0.5] * 784}


WAYS = ["predict", "raw", "stream", "infer"]


def ask(traced: Client, way: str, headers: dict[str, str], **wishes: object) -> tuple[str, int]:
    """The route and the status of its answer."""
    model, sent = "/v1/models/digits", {"json": {"inputs": [IMAGE], **wishes}}
    url = {"stream": f"{model}/predict/stream", "infer": "/v2/models/digits/infer"}.get(way, f"{model}/predict")
    if way == "infer":
        sent = {"json": {"inputs": [TENSOR], "parameters": wishes}}
    if way == "raw":
        headers = headers | {"content-type": "application/octet-stream"}
        sent = {"content": RAW, "params": {name: str(wish).lower() for name, wish in wishes.items()}}
    return url.replace("digits", "{model}"), traced.request("POST", url, headers=headers, **sent).status_code


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_ask_is_traced(traced: Client, exporter: InMemorySpanExporter, way: str) -> None:
    exporter.clear()
    headers = {"traceparent": f"00-{7:032x}-{8:016x}-01", "x-request-id": "mine"}
    route, status = ask(traced, way, headers, path="4-6")
    assert status == 200
    *children, whole = sorted(exporter.get_finished_spans(), key=lambda span: span.parent.span_id == 8)
    assert whole.name == f"POST {route}"
    assert whole.attributes["http.response.status_code"] == 200
    assert whole.attributes["hbll.model"] == "digits"
    assert whole.attributes["hbll.request_id"] == "mine"
    assert whole.context.trace_id == 7
    names = [child.name for child in sorted(children, key=lambda child: child.start_time)]
    assert names[0] == "queue"
    assert set(names[1:]) == {"segment"}
    nodes = [child.attributes["hbll.nodes"] for child in children if child.name == "segment"]
    assert "-".join(nodes) == "4-6"
    for child in children:
        assert child.parent.span_id == whole.context.span_id
        assert whole.start_time <= child.start_time <= child.end_time <= whole.end_time


def failed(traced: Client) -> float:
    """How many calls were admitted and ended in an error."""
    line = 'hbll_failed_seconds_count{model="digits",version="1"} '
    found = [text for text in traced.get("/metrics").text.splitlines() if text.startswith(line)]
    return float(found[0].removeprefix(line)) if found else 0.0


@pytest.mark.parametrize("way", WAYS)
def test_a_request_that_was_admitted_and_failed_is_counted_and_traced(
    traced: Client, exporter: InMemorySpanExporter, way: str
) -> None:
    exporter.clear()
    before = failed(traced)
    assert ask(traced, way, {}, latency_budget_ms=0.001, strict=True)[1] == 504
    assert failed(traced) == before + 1
    (span,) = exporter.get_finished_spans()
    assert span.attributes["http.response.status_code"] == 504
    assert not span.status.is_ok


@pytest.mark.parametrize("streamed", [False, True])
def test_calls_by_grpc_are_traced(traced: Client, exporter: InMemorySpanExporter, streamed: bool) -> None:
    message = pb.ModelInferRequest(model_name="digits", raw_input_contents=[RAW])
    message.inputs.add(name="x", datatype="FP32", shape=[1, 28, 28])
    message.parameters["path"].string_param = "4-6"
    metadata = [("traceparent", f"00-{7:032x}-{8:016x}-01")]
    with grpc.insecure_channel(traced.rpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        def call(**options: object) -> None:
            exporter.clear()
            if streamed:
                list(stub.ModelStreamInfer(iter([message]), **options))
            else:
                stub.ModelInfer(message, **options)

        call(metadata=metadata)
        *children, whole = sorted(exporter.get_finished_spans(), key=lambda span: span.parent.span_id == 8)
        assert whole.name == f"inference.GRPCInferenceService/{'ModelStreamInfer' if streamed else 'ModelInfer'}"
        assert (whole.context.trace_id, whole.attributes["rpc.system"]) == (7, "grpc")
        assert whole.attributes["rpc.grpc.status_code"] == 0
        assert [child.parent.span_id for child in children] == [whole.context.span_id] * len(children)
        assert "queue" in [child.name for child in children]
        message.parameters["latency_budget_ms"].double_param = 0.001
        message.parameters["strict"].bool_param = True
        before = failed(traced)
        if streamed:
            call()
        else:
            with pytest.raises(grpc.RpcError):
                call()
        assert failed(traced) == before + 1
        (span,) = exporter.get_finished_spans()
        assert span.attributes["rpc.grpc.status_code"] == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert not span.status.is_ok
