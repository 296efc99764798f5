"""The server's metrics as the statistics extension has them. It counts nothing of its own."""

from __future__ import annotations

from prometheus_client.metrics import MetricWrapperBase

from service.metrics import Metrics
from service.oip.schemas import Duration, InferenceStatistics, ModelStatistics
from service.repository import ServedModel

_NS_PER_S = 1_000_000_000


def statistics_of(metrics: Metrics, served: ServedModel) -> ModelStatistics:
    """What `served` has done since the server became ready."""
    name = served.name
    never = Duration(count=0, ns=0)
    compute = _duration(metrics.compute_seconds, name)
    # Decoding and encoding are not timed apart. perf_analyzer ends where the three counts differ.
    untimed = Duration(count=compute.count, ns=0)
    inference = InferenceStatistics(
        success=_duration(metrics.total_seconds, name),
        fail=_duration(metrics.failed_seconds, name),
        queue=_duration(metrics.queue_seconds, name),
        compute_input=untimed,
        compute_infer=compute,
        compute_output=untimed,
        cache_hit=never,
        cache_miss=never,
    )
    return ModelStatistics(
        name=name,
        version=str(served.version),
        last_inference=int(_sum(metrics.last_answer, name, "") * 1000),
        inference_count=int(_sum(metrics.answers, name, "_total")),
        execution_count=int(_sum(metrics.batch_rows, name, "_count")),
        inference_stats=inference,
        batch_stats=[],
    )


def _duration(histogram: MetricWrapperBase, model: str) -> Duration:
    return Duration(count=int(_sum(histogram, model, "_count")), ns=int(_sum(histogram, model, "_sum") * _NS_PER_S))


def _sum(metric: MetricWrapperBase, model: str, suffix: str) -> float:
    """The sum of a metric's samples of this kind over all its other labels."""
    samples = (sample for family in metric.collect() for sample in family.samples if sample.name == family.name + suffix)
    return sum(sample.value for sample in samples if sample.labels["model"] == model)
