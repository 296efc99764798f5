"""Prometheus metrics, in a registry of the app's own."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics import MetricWrapperBase

_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_DECISIONS = (0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)
_RATIOS = (0.25, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 3, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

_VERSION = ("model", "version")

M = TypeVar("M", bound=MetricWrapperBase)


class Metrics:
    """Everything that is counted and timed. Requests are what clients send, rows are the inputs in them.

    What concerns a model has the labels `model` and `version`, first and in this order, as long as that version is
    served: so there are as many series as the settings let be.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(name, about, labels, registry=registry)

        def gauge(name: str, about: str, *labels: str) -> Gauge:
            return Gauge(name, about, labels, registry=registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, about, labels, buckets=buckets, registry=registry)

        self.requests = counter("hbll_requests", "Requests admitted", *_VERSION)
        self.refusals = counter("hbll_refusals", "Requests answered by an error", "code")
        self.answers = counter("hbll_answers", "Rows answered", *_VERSION, "depth", "stopped_by")
        self.block_rows = counter("hbll_block_rows", "Rows times blocks run: the work done", *_VERSION)
        self.deadlines = counter("hbll_deadlines", "Requests with a budget answered", *_VERSION, "met")
        self.queue_rows = gauge("hbll_queue_rows", "Rows that wait")
        self.unread_requests = gauge("hbll_unread_requests", "Requests that wait for the event loop to read them")
        self.queue_seconds = histogram("hbll_queue_seconds", "From arrival to the first block", _SECONDS, *_VERSION)
        self.compute_seconds = histogram("hbll_compute_seconds", "Inference of a request's rows", _SECONDS, *_VERSION)
        self.total_seconds = histogram("hbll_total_seconds", "From arrival to the answer", _SECONDS, *_VERSION)
        self.decision_seconds = histogram("hbll_decision_seconds", "What the policy takes to decide", _DECISIONS)
        self.profile_ratio = histogram(
            "hbll_profile_ratio", "What a run took, by what it was expected to take", _RATIOS, *_VERSION
        )
        self.audits = counter("hbll_audits", "Audits of certified answers", *_VERSION, "epsilon", "differs")
        self.drift = gauge("hbll_drift_alarm", "1 when audits have refuted a level", *_VERSION, "epsilon")
        self.worker_deaths = counter("hbll_worker_deaths", "Deaths of the inference thread")
        self.worker_hangs = counter("hbll_worker_hangs", "Runs that took so much longer than expected that it may hang")
        self.reloads = counter("hbll_reloads", "New versions found", "model", "loaded")
        self.weights_bytes = gauge("hbll_model_weights_bytes", "Weights on disk, for all paths together", *_VERSION)
        self.grown_bytes = gauge(
            "hbll_model_grown_bytes", "What the process grew by while the version was loaded and measured", *_VERSION
        )
        self.gc_seconds = histogram("hbll_gc_pause_seconds", "Pauses by Python's garbage collection", _DECISIONS)
        self.failed_seconds = histogram(
            "hbll_failed_seconds", "From arrival to the error, of requests that were admitted", _SECONDS, *_VERSION
        )
        self.last_answer = gauge("hbll_last_answer_timestamp_seconds", "When a request was answered last", *_VERSION)
        self.batch_rows = histogram("hbll_batch_rows", "Rows of one inference", _ROWS, *_VERSION)
        self.ready = gauge("hbll_ready", "1 when the server is ready")
        self._children: dict[tuple[MetricWrapperBase, tuple[str, ...]], Any] = {}

    def of(self, metric: M, *labels: str) -> M:
        """`metric.labels(*labels)`, found again at once: for what every request counts."""
        child = self._children.get((metric, labels))
        if child is None:
            child = self._children[metric, labels] = metric.labels(*labels)
        found: M = child
        return found

    def clear(self) -> None:
        """Forget what was counted so far, by warm-up."""
        counters = (self.requests, self.refusals, self.answers, self.block_rows, self.deadlines)
        times = (self.queue_seconds, self.compute_seconds, self.total_seconds, self.failed_seconds, self.last_answer)
        for metric in (*counters, *times, self.batch_rows, self.profile_ratio, self.audits):
            metric.clear()
        self._children.clear()

    def render(self, served: Container[tuple[str, str]]) -> bytes:
        """The exposition text. Of versions that are not `served` any more what was counted is told once again, so that
        the last of it is not lost, and then forgotten; their gauges are forgotten at once."""
        by_version = [
            metric
            for metric in vars(self).values()
            if isinstance(metric, MetricWrapperBase) and metric._labelnames[:2] == _VERSION
        ]
        _forget([metric for metric in by_version if isinstance(metric, Gauge)], served)
        text = generate_latest(self.registry)
        _forget(by_version, served)
        self._children.clear()  # some may have been forgotten
        return text


def _forget(metrics: list[MetricWrapperBase], served: Container[tuple[str, str]]) -> None:
    for metric in metrics:
        for labels in list(metric._metrics):  # to find them in samples would take as long as to tell them
            if labels[:2] not in served:
                metric.remove(*labels)
