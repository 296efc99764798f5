"""Prometheus metrics, in a registry of the app's own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_DECISIONS = (0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)
_RATIOS = (0.25, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 3, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Everything that is counted and timed. Requests are what clients send, rows are the inputs in them."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def histogram(name: str, about: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, about, labels, buckets=buckets, registry=registry)

        self.requests = Counter("hbll_requests", "Requests admitted", ["model"], registry=registry)
        self.refusals = Counter("hbll_refusals", "Requests answered by an error", ["code"], registry=registry)
        self.answers = Counter("hbll_answers", "Rows answered", ["model", "depth", "stopped_by"], registry=registry)
        self.block_rows = Counter("hbll_block_rows", "Rows times blocks run: the work done", ["model"], registry=registry)
        self.deadlines = Counter("hbll_deadlines", "Requests with a budget answered", ["model", "met"], registry=registry)
        self.queue_rows = Gauge("hbll_queue_rows", "Rows that wait", registry=registry)
        self.queue_seconds = histogram("hbll_queue_seconds", "From arrival to the first block", _SECONDS, "model")
        self.compute_seconds = histogram("hbll_compute_seconds", "Inference of a request's rows", _SECONDS, "model")
        self.total_seconds = histogram("hbll_total_seconds", "From arrival to the answer", _SECONDS, "model")
        self.decision_seconds = histogram("hbll_decision_seconds", "What the policy takes to decide", _DECISIONS)
        self.profile_ratio = histogram(
            "hbll_profile_ratio", "What a run took, by what it was expected to take", _RATIOS, "model"
        )
        self.audits = Counter(
            "hbll_audits", "Audits of certified answers", ["model", "epsilon", "differs"], registry=registry
        )
        self.drift = Gauge(
            "hbll_drift_alarm", "1 when audits have refuted a level", ["model", "epsilon"], registry=registry
        )
        self.worker_deaths = Counter("hbll_worker_deaths", "Deaths of the inference thread", registry=registry)
        self.reloads = Counter("hbll_reloads", "New versions found", ["model", "loaded"], registry=registry)
        self.gc_seconds = histogram("hbll_gc_pause_seconds", "Pauses by Python's garbage collection", _DECISIONS)
        self.failed_seconds = histogram(
            "hbll_failed_seconds", "From arrival to the error, of requests that were admitted", _SECONDS, "model"
        )
        self.last_answer = Gauge(
            "hbll_last_answer_timestamp_seconds", "When a request was answered last", ["model"], registry=registry
        )
        self.batch_rows = histogram("hbll_batch_rows", "Rows of one inference", _ROWS, "model")
        self.ready = Gauge("hbll_ready", "1 when the server is ready", registry=registry)

    def clear(self) -> None:
        """Forget what was counted so far, by warm-up."""
        counters = (self.requests, self.refusals, self.answers, self.block_rows, self.deadlines)
        times = (self.queue_seconds, self.compute_seconds, self.total_seconds, self.failed_seconds, self.last_answer)
        for metric in (*counters, *times, self.batch_rows, self.profile_ratio, self.audits):
            metric.clear()

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)
