from __future__ import annotations

import re
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from family.tree import format_path
from tests.conftest import Trained
from tests.contract.conftest import Client


def test_models_are_listed(client: Client) -> None:
    one = {"name": "digits", "version": 1, "ready": True, "versions": [1]}
    assert client.get("/v1/models").json() == {"models": [one]}
    for url in ("/v1/models/digits", "/v1/models/digits/versions/1"):
        assert client.get(f"{url}/ready").json() == one
    assert client.get("/v1/models/digits/versions").json() == {
        "name": "digits",
        "policy": "latest",
        "versions": [{"version": 1, "ready": True, "default": True, "reason": None}],
    }


ROUTES = {
    "": "GET",
    "/ready": "GET",
    "/plan": "GET",
    "/audits": "GET",
    "/audits/reset": "POST",
    "/predict": "POST",
    "/predict/stream": "POST",
}


@pytest.mark.parametrize("suffix", ROUTES)
def test_every_route_of_a_model_takes_a_version(client: Client, suffix: str) -> None:
    def ask(model: str) -> httpx.Response:
        body = {"json": {"inputs": [[[0.5] * 28] * 28]}} if "predict" in suffix else {}
        return client.request(ROUTES[suffix], f"/v1/models/{model}{suffix}", **body)

    assert ask("digits/versions/1").status_code == 200
    for version in ("2", "01", "latest", "1 "):
        refused = ask(f"digits/versions/{version}")
        assert (refused.status_code, refused.json()["code"]) == (404, "unknown_version")
        assert refused.json()["versions"] == ["1"]
    assert ask("cats/versions/1").json()["code"] == "unknown_model"


def test_raw_bodies_may_name_a_version_too(client: Client) -> None:
    row = np.full((28, 28), 0.5, "<f4").tobytes()
    octets = {"content-type": "application/octet-stream"}
    urls = [f"/v1/models/digits{version}/predict?path=4-6" for version in ("", "/versions/1", "/versions/2")]
    plain, named, unknown = (client.request("POST", url, content=row, headers=octets) for url in urls)
    assert named.json()["predictions"] == plain.json()["predictions"]
    assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_version")


def test_a_model_tells_what_it_takes_in_memory(client: Client, trained: Trained) -> None:
    detail = client.get("/v1/models/digits").json()
    memory = detail["memory"]
    assert memory["weights_bytes"] == (trained.bundle / "weights.bin").stat().st_size
    offered = trained.manifest.offered.values()
    assert [path["weights_bytes"] for path in detail["paths"]] == [4 * entry.parameters for entry in offered]
    assert memory["separate_bytes"] == sum(4 * entry.parameters for entry in offered) > memory["weights_bytes"]
    told = Path("/proc/self/smaps_rollup").exists()
    assert isinstance(memory["grown_bytes"], int if told else type(None))
    text = client.get("/metrics").text
    labels = '{model="digits",version="1"}'
    assert float(re.search(f"^hbll_model_weights_bytes{labels} (.*)$", text, re.MULTILINE)[1]) == memory["weights_bytes"]
    if told:
        assert float(re.search(f"^hbll_model_grown_bytes{labels} (.*)$", text, re.MULTILINE)[1]) == memory["grown_bytes"]
    assert "process_resident_memory_bytes" in text or not told


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
