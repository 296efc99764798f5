"""The server's metrics as the statistics extension has them. It counts nothing of its own."""

from __future__ import annotations

from prometheus_client.metrics import MetricWrapperBase

from service.metrics import Metrics
from service.oip.schemas import Duration, InferenceStatistics, ModelStatistics
from service.repository import ServedModel

_NS_PER_S = 1_000_000_000


def statistics_of(metrics: Metrics, served: ServedModel) -> ModelStatistics:
    """What `served` has done since the server became ready."""
    never = Duration(count=0, ns=0)
    compute = _duration(metrics.compute_seconds, served)
    # Decoding and encoding are not timed apart. perf_analyzer ends where the three counts differ.
    untimed = Duration(count=compute.count, ns=0)
    inference = InferenceStatistics(
        success=_duration(metrics.total_seconds, served),
        fail=_duration(metrics.failed_seconds, served),
        queue=_duration(metrics.queue_seconds, served),
        compute_input=untimed,
        compute_infer=compute,
        compute_output=untimed,
        cache_hit=never,
        cache_miss=never,
    )
    return ModelStatistics(
        name=served.name,
        version=str(served.version),
        last_inference=int(_sum(metrics.last_answer, served, "") * 1000),
        inference_count=int(_sum(metrics.answers, served, "_total")),
        execution_count=int(_sum(metrics.batch_rows, served, "_count")),
        inference_stats=inference,
        batch_stats=[],
    )


def _duration(histogram: MetricWrapperBase, served: ServedModel) -> Duration:
    return Duration(count=int(_sum(histogram, served, "_count")), ns=int(_sum(histogram, served, "_sum") * _NS_PER_S))


def _sum(metric: MetricWrapperBase, served: ServedModel, suffix: str) -> float:
    """The sum of a metric's samples of this kind over all its other labels."""
    samples = (sample for family in metric.collect() for sample in family.samples if sample.name == family.name + suffix)
    return sum(sample.value for sample in samples if (sample.labels["model"], sample.labels["version"]) == served.labels)
