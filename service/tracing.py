"""Traces of requests for OpenTelemetry, if the extra `otel` is installed and an exporter is configured.

The engine and the routes know nothing of it: they note plain `Timed` segments on the monotonic clock, which cost next to
nothing, and when a request has ended its segments become spans here, the request's own with the others as its children.
So nothing is traced across an `await`, and no span depends on which task ran when. Spans are sent by a thread of the SDK.

Configuration is OpenTelemetry's own (https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables):
`OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_TRACES_EXPORTER` turn it on; `OTEL_TRACES_SAMPLER`, `OTEL_SERVICE_NAME` and the
others are the SDK's to read.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_STATUS, _RPC_STATUS = "http.response.status_code", "rpc.grpc.status_code"
_FAILED_RPCS = (2, 4, 12, 13, 14, 15)
"""UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS: a server's own by the conventions."""


@dataclass(frozen=True, slots=True)
class Timed:
    """Something that took from `start_s` to `end_s` on the monotonic clock."""

    name: str
    start_s: float
    end_s: float
    attributes: Mapping[str, str | int | float | bool] = field(default_factory=dict)


class Tracer:
    """Makes spans of what was timed. `open_tracer` makes the one that the environment asks for."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("hbll.service")
        # One offset for all spans: a step of the wall clock later cannot put a child outside of its parent.
        self._epoch_offset_ns = time.time_ns() - time.monotonic_ns()

    def export(self, request: Timed, children: Sequence[Timed], traceparent: str | None) -> None:
        """Emit the server span of a request that has ended, and its parts as child spans.

        Args:
            request: the whole; its attributes may follow the semantic conventions, and an `http.response.status_code` of
                500 or more, or a gRPC status that is the server's fault, marks the span as failed, as they demand.
            children: its parts, in any order; they may overlap.
            traceparent: the header of that name (W3C Trace Context), if the request had one. A malformed one counts as
                none.
        """
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # Into an empty context, so that a span that happens to be current here is not taken for the parent.
        context = Context()
        if traceparent is not None:
            context = TraceContextTextMapPropagator().extract({"traceparent": traceparent}, context)
        span = self._tracer.start_span(
            request.name,
            context,
            kind=SpanKind.SERVER,
            attributes=request.attributes,
            start_time=self._epoch_ns(request.start_s),
        )
        if span.is_recording():  # else not sampled, and neither are its children
            within = set_span_in_context(span, Context())
            for child in children:
                start_ns, end_ns = self._epoch_ns(child.start_s), self._epoch_ns(child.end_s)
                self._tracer.start_span(child.name, within, attributes=child.attributes, start_time=start_ns).end(end_ns)
            status = request.attributes.get(_STATUS)
            failed = isinstance(status, int) and status >= 500
            if failed or request.attributes.get(_RPC_STATUS) in _FAILED_RPCS:
                span.set_status(StatusCode.ERROR)
        span.end(self._epoch_ns(request.end_s))

    def close(self) -> None:
        """Send what is still to be sent. May wait for the exporter, at most for its own timeout."""
        self._provider.shutdown()

    def _epoch_ns(self, monotonic_s: float) -> int:
        return round(monotonic_s * 1e9) + self._epoch_offset_ns


def open_tracer() -> Tracer | None:
    """The tracer that the `OTEL_*` variables ask for, or None if they ask for none.

    Also None, with a warning, if what they ask for is not installed: by OpenTelemetry's specification, tracing must not
    keep a service from starting.
    """
    names = _exporter_names()
    if not names:
        return None
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as exc:
        logger.warning("no traces are exported: %s is not installed: pip install 'hbll-anytime[otel]'", exc.name)
        return None
    found = [entry for name in names for entry in entry_points(group="opentelemetry_traces_exporter", name=name)]
    if len(found) < len(names):
        missing = ", ".join(sorted(set(names) - {entry.name for entry in found}))
        logger.warning("no traces are exported: no exporter %s is installed: pip install 'hbll-anytime[otel]'", missing)
        return None
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # the SDK's own default
        resource = resource.merge(Resource({SERVICE_NAME: "hbll"}))
    provider = TracerProvider(resource=resource)
    for entry in found:
        provider.add_span_processor(BatchSpanProcessor(entry.load()()))
    return Tracer(provider)


def _exporter_names() -> list[str]:
    """The exporters that the environment asks for, by the names under which packages offer them."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    asked = os.environ.get("OTEL_TRACES_EXPORTER", "").strip()
    if not asked and any(os.environ.get(name) for name in _ENDPOINTS):
        asked = "otlp"
    protocol = next(filter(None, map(os.environ.get, _PROTOCOLS)), "http/protobuf")
    otlp = "otlp_proto_grpc" if protocol.strip() == "grpc" else "otlp_proto_http"
    names = [name.strip() for name in asked.split(",")]
    return [otlp if name == "otlp" else name for name in names if name not in ("", "none")]
