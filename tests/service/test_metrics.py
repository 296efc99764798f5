from __future__ import annotations

from service.metrics import Metrics


def test_what_a_gone_version_counted_is_told_once_more_and_then_forgotten() -> None:
    metrics = Metrics()
    for version in ("1", "2"):
        metrics.requests.labels("digits", version).inc()
        metrics.answers.labels("digits", version, 3, "complete").inc()
        metrics.total_seconds.labels("digits", version).observe(0.1)
        metrics.drift.labels("digits", version, "0.05").set(1)
    metrics.reloads.labels("digits", "true").inc()
    served = {("digits", "2")}
    text = metrics.render(served).decode()
    assert 'hbll_requests_total{model="digits",version="1"} 1.0' in text
    assert 'hbll_drift_alarm{epsilon="0.05",model="digits",version="1"}' not in text  # nobody is to be woken for it
    metrics.answers.labels("digits", "1", 3, "complete").inc()  # an answer that was on its way
    metrics.render(served)
    text = metrics.render(served).decode()
    assert 'version="1"' not in text
    for line in (
        'hbll_requests_total{model="digits",version="2"} 1.0',
        'hbll_drift_alarm{epsilon="0.05",model="digits",version="2"} 1.0',
        'hbll_reloads_total{loaded="true",model="digits"} 1.0',
    ):
        assert line in text


def test_what_is_counted_again_after_it_was_forgotten_is_told_again() -> None:
    metrics = Metrics()
    metrics.of(metrics.requests, "digits", "1").inc()
    metrics.clear()
    metrics.of(metrics.requests, "digits", "1").inc()
    assert 'hbll_requests_total{model="digits",version="1"} 1.0' in metrics.render({("digits", "1")}).decode()
    metrics.render(set())
    metrics.of(metrics.requests, "digits", "1").inc()  # it was unloaded, and is served again
    assert 'hbll_requests_total{model="digits",version="1"} 1.0' in metrics.render({("digits", "1")}).decode()
