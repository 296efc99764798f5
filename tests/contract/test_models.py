from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from family.tree import format_path
from tests.conftest import Trained
from tests.contract.conftest import Client


def test_models_are_listed(client: Client) -> None:
    assert client.get("/v1/models").json() == {"models": [{"name": "digits", "version": 1, "ready": True}]}


def test_a_model_tells_all_its_paths_with_measured_latency(client: Client, trained: Trained) -> None:
    detail = client.get("/v1/models/digits").json()
    manifest = trained.manifest
    assert [row["path"] for row in detail["paths"]] == [format_path(path) for path in manifest.offered]
    assert detail["reference"] == format_path(manifest.reference)
    for row, (path, entry) in zip(detail["paths"], manifest.offered.items(), strict=True):
        assert row["depth"] == len(path)
        assert row["accuracy"] == pytest.approx(entry.validation.accuracy)
        assert row["latency_ms"] > 0
        assert row["pareto"] == (path in manifest.front)
        assert row["best_of_depth"] == (path in manifest.best_by_depth.values())


def test_health(client: Client) -> None:
    assert (client.get("/health/live").status_code, client.get("/health/live").json()) == (200, {"live": True})
    assert (client.get("/health/ready").status_code, client.get("/health/ready").json()) == (
        200,
        {"ready": True, "drift_alarms": {}},
    )


def test_metrics_count_what_was_answered(client: Client) -> None:
    def value(name: str, **labels: str) -> float:
        text = client.get("/metrics").text
        samples = (sample for metric in text_string_to_metric_families(text) for sample in metric.samples)
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    before = [
        value("hbll_answers_total", depth="2", stopped_by="depth"),
        value("hbll_refusals_total", code="not_offered"),
        value("hbll_deadlines_total", met="true"),
        value("hbll_total_seconds_count"),
    ]
    image = [[0.5] * 28] * 28
    client.predict({"inputs": [image, image, image], "depth": 2})
    client.predict({"inputs": [image], "depth": 9})
    client.predict({"inputs": [image], "latency_budget_ms": 10_000})
    after = [
        value("hbll_answers_total", depth="2", stopped_by="depth"),
        value("hbll_refusals_total", code="not_offered"),
        value("hbll_deadlines_total", met="true"),
        value("hbll_total_seconds_count"),
    ]
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 1, 1, 2]
    assert value("hbll_ready") == 1
    assert value("hbll_queue_rows") == 0
