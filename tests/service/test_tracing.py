from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import SpanKind, StatusCode

from service.tracing import Timed, Tracer, open_tracer

TRACE, SPAN = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
SAMPLED, NOT_SAMPLED = f"00-{TRACE:032x}-{SPAN:016x}-01", f"00-{TRACE:032x}-{SPAN:016x}-00"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (
        "OTEL_SDK_DISABLED",
        "OTEL_TRACES_EXPORTER",
        "OTEL_TRACES_SAMPLER",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        "OTEL_EXPORTER_OTLP_PROTOCOL",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
        "OTEL_SERVICE_NAME",
        "OTEL_RESOURCE_ATTRIBUTES",
    ):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def exported() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exported: InMemorySpanExporter) -> Iterator[TracerProvider]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exported))
    yield provider
    provider.shutdown()


@pytest.fixture
def tracer(provider: TracerProvider) -> Tracer:
    return Tracer(provider)


def by_name(exported: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    spans = exported.get_finished_spans()
    assert len({span.name for span in spans}) == len(spans)
    return {span.name: span for span in spans}


def test_a_request_is_a_server_span_with_its_parts_as_children(tracer: Tracer, exported: InMemorySpanExporter) -> None:
    request = Timed("POST /predict", 10.0, 10.5, {"http.response.status_code": 200, "hbll.strict": True})
    parts = [Timed("queue", 10.1, 10.2), Timed("inference", 10.2, 10.4, {"hbll.rows": 8, "hbll.path": "1-2-4"})]
    tracer.export(request, parts, None)
    spans = by_name(exported)
    whole = spans["POST /predict"]
    assert set(spans) == {"POST /predict", "queue", "inference"}
    assert whole.kind is SpanKind.SERVER
    assert whole.parent is None
    assert whole.attributes == request.attributes
    assert whole.status.status_code is StatusCode.UNSET
    for part in parts:
        child = spans[part.name]
        assert child.kind is SpanKind.INTERNAL
        assert child.parent == whole.get_span_context()
        assert child.context.trace_id == whole.context.trace_id
        assert child.attributes == part.attributes
        assert child.start_time - whole.start_time == pytest.approx((part.start_s - request.start_s) * 1e9, abs=2)
        assert child.end_time - child.start_time == pytest.approx((part.end_s - part.start_s) * 1e9, abs=2)


def test_monotonic_times_become_times_of_day(tracer: Tracer, exported: InMemorySpanExporter) -> None:
    before_ns = time.time_ns()
    start_s = time.monotonic()
    after_ns = time.time_ns()
    tracer.export(Timed("request", start_s, start_s + 0.25), [], None)
    (span,) = exported.get_finished_spans()
    slack_ns = 1_000_000  # of a wall clock that is being slewed
    assert before_ns - slack_ns <= span.start_time <= after_ns + slack_ns
    assert span.end_time - span.start_time == 250_000_000


def test_the_callers_trace_goes_on(tracer: Tracer, exported: InMemorySpanExporter) -> None:
    tracer.export(Timed("request", 1.0, 2.0), [Timed("queue", 1.0, 1.5)], SAMPLED)
    spans = by_name(exported)
    parent = spans["request"].parent
    assert parent is not None
    assert (parent.trace_id, parent.span_id, parent.is_remote) == (TRACE, SPAN, True)
    assert {span.context.trace_id for span in spans.values()} == {TRACE}


@pytest.mark.parametrize(
    "traceparent", ["", "nonsense", SAMPLED[:-3], f"00-{0:032x}-{SPAN:016x}-01", f"ff-{TRACE:032x}-{SPAN:016x}-01"]
)
def test_a_malformed_traceparent_begins_a_new_trace(
    tracer: Tracer, exported: InMemorySpanExporter, traceparent: str
) -> None:
    tracer.export(Timed("request", 1.0, 2.0), [], traceparent)
    (span,) = exported.get_finished_spans()
    assert span.parent is None
    assert span.context.trace_id not in (0, TRACE)


def test_a_span_that_happens_to_be_current_is_no_parent(
    tracer: Tracer, provider: TracerProvider, exported: InMemorySpanExporter
) -> None:
    with provider.get_tracer("another").start_as_current_span("current"):
        tracer.export(Timed("request", 1.0, 2.0), [Timed("queue", 1.0, 1.5)], None)
    spans = by_name(exported)
    assert spans["request"].parent is None
    assert spans["queue"].parent == spans["request"].get_span_context()


def test_what_the_caller_does_not_sample_is_not_exported(tracer: Tracer, exported: InMemorySpanExporter) -> None:
    tracer.export(Timed("request", 1.0, 2.0), [Timed("queue", 1.0, 1.5)], NOT_SAMPLED)
    assert exported.get_finished_spans() == ()


def test_the_providers_sampler_decides_on_new_traces(exported: InMemorySpanExporter) -> None:
    provider = TracerProvider(sampler=ParentBased(ALWAYS_OFF))
    provider.add_span_processor(SimpleSpanProcessor(exported))
    tracer = Tracer(provider)
    tracer.export(Timed("ours", 1.0, 2.0), [], None)
    tracer.export(Timed("theirs", 1.0, 2.0), [], SAMPLED)
    tracer.close()
    assert [span.name for span in exported.get_finished_spans()] == ["theirs"]


@pytest.mark.parametrize(
    ("status", "code"), [(200, StatusCode.UNSET), (429, StatusCode.UNSET), (500, StatusCode.ERROR), (504, StatusCode.ERROR)]
)
def test_only_the_servers_own_failures_are_errors(
    tracer: Tracer, exported: InMemorySpanExporter, status: int, code: StatusCode
) -> None:
    tracer.export(Timed("request", 1.0, 2.0, {"http.response.status_code": status}), [], None)
    (span,) = exported.get_finished_spans()
    assert span.status.status_code is code


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"},
        {"OTEL_TRACES_EXPORTER": " , "},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "otlp"},
    ],
)
def test_without_an_exporter_there_is_no_tracer(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert open_tracer() is None
    assert caplog.records == []


def test_a_missing_package_is_named_and_does_no_harm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with caplog.at_level(logging.WARNING):
        assert open_tracer() is None
    assert "opentelemetry.sdk.trace is not installed: pip install 'hbll-anytime[otel]'" in caplog.text


def test_the_module_needs_nothing_of_opentelemetry() -> None:
    code = "import sys; sys.modules['opentelemetry'] = None; import service.tracing as t; print(t.open_tracer())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.stdout == "None\n", done.stderr


@pytest.mark.parametrize("name", ["zipkin-of-old", "otlp,zipkin-of-old"])
def test_an_unknown_exporter_is_named_and_does_no_harm(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", name)
    assert open_tracer() is None
    assert "no exporter zipkin-of-old is installed" in caplog.text


@pytest.fixture
def collector() -> Iterator[tuple[str, Future[tuple[str, bytes]]]]:
    """A real HTTP server: its URL, and the path and body of the first request that it will get."""
    received: Future[tuple[str, bytes]] = Future()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if not received.done():
                received.set_result((self.path, body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("asked", [{}, {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SERVICE_NAME": "digits"}])
def test_spans_reach_a_collector(
    asked: dict[str, str], collector: tuple[str, Future[tuple[str, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, received = collector
    for name, value in {"OTEL_EXPORTER_OTLP_ENDPOINT": url, **asked}.items():
        monkeypatch.setenv(name, value)
    tracer = open_tracer()
    assert tracer is not None
    tracer.export(Timed("request", 1.0, 2.0), [Timed("queue", 1.0, 1.5)], SAMPLED)
    tracer.close()
    path, body = received.result(timeout=30)
    assert path == "/v1/traces"
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    names = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert names["service.name"] == asked.get("OTEL_SERVICE_NAME", "hbll")
    spans = [span for scope in resource.scope_spans for span in scope.spans]
    assert {span.name for span in spans} == {"request", "queue"}
    assert {span.trace_id for span in spans} == {TRACE.to_bytes(16, "big")}
