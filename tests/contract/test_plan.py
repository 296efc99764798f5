"""What would be picked, and whether it is."""

from __future__ import annotations

from urllib.parse import urlencode

import pytest

from family.tree import format_path
from tests.conftest import Trained
from tests.contract.conftest import Client

URL = "/v1/models/digits/plan"
IMAGE = [[0.5] * 28] * 28


def plan(client: Client, **wishes: object) -> dict[str, object]:
    response = client.get(f"{URL}?{urlencode(wishes)}")
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"depth": 1},
        {"depth": 4},
        {"depth": "best"},
        {"depth": "full"},
        {"path": "2-4-6"},
        {"min_confidence": 1},
        {"latency_budget_ms": 5000},
        {"latency_budget_ms": 5000, "strict": True},
        {"min_confidence": 1, "latency_budget_ms": 5000},
    ],
    ids=str,
)
def test_an_idle_server_does_what_was_planned(client: Client, wish: dict[str, object]) -> None:
    planned = plan(client, **wish)
    assert planned["feasible"] is True
    (row,) = client.predict({"inputs": [IMAGE], **wish}).json()["predictions"]
    assert (row["path"], row["depth"]) == (planned["path"], planned["depth"])
    *_, last = planned["answers"]
    assert (last["path"], last["expected_ms"]) == (planned["path"], planned["expected_ms"])


def test_a_climb_is_planned_rung_by_rung(client: Client, trained: Trained) -> None:
    planned = plan(client, min_confidence=1)
    manifest = trained.manifest
    assert [answer["path"] for answer in planned["answers"]] == [format_path(path) for path in manifest.climb]
    assert [answer["accuracy"] for answer in planned["answers"]] == [manifest.accuracies[path] for path in manifest.climb]
    times = [answer["expected_ms"] for answer in planned["answers"]]
    assert times == sorted(times)
    assert times[0] > 0
    assert planned["reason"] == (
        "the reference path: nothing deeper is better, unless an answer before it is confident enough"
    )
    assert (planned["model"], planned["version"], planned["policy"]) == ("digits", 1, "ladder-edf")


def test_a_certified_climb_is_planned(client: Client, trained: Trained) -> None:
    assert trained.manifest.certificate is not None
    level = trained.manifest.certificate.levels[-1].epsilon
    assert [each["path"] for each in plan(client, max_risk=level)["answers"]] == list(trained.manifest.certificate.sequence)


def test_a_budget_that_cannot_be_met_is_infeasible_and_says_what_would_happen(client: Client) -> None:
    planned = plan(client, latency_budget_ms=0.001)
    assert planned["feasible"] is False
    assert planned["reason"].endswith("it would come late, or the request expire in the queue")
    planned = plan(client, latency_budget_ms=0.001, strict=True)
    assert planned["feasible"] is False
    assert planned["reason"].endswith("the request would be refused")
    response = client.predict({"inputs": [IMAGE], "latency_budget_ms": 0.001, "strict": True})
    assert (response.status_code, response.json()["code"]) == (504, "deadline_infeasible")
    assert plan(client, depth=7, latency_budget_ms=0.001)["path"] == "1-2-3-4-5-6-7"  # still what would run


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ("dept=2", 422, "dept"),
        ("depth=9", 422, "depth 9 is not offered: expected one of"),
        ("depth=0", 422, "depth"),
        ("path=4-7", 422, "4 -> 7 is no hop"),
        ("rows=0", 422, "rows"),
        ("rows=41", 422, "rows: expected at most 40, got 41"),
        ("latency_budget_ms=inf", 422, "latency_budget_ms"),
        ("max_risk=0.0123", 422, "max_risk 0.0123 is not certified"),
        ("depth=1&path=4", 422, "give only one of depth, path, min_confidence and max_risk, got depth and path"),
    ],
)
def test_wishes_that_no_request_could_have_are_422(client: Client, query: str, status: int, message: str) -> None:
    response = client.get(f"{URL}?{query}")
    assert response.status_code == status, response.text
    assert set(response.json()) >= {"error", "code"}
    assert message in response.json()["error"]


def test_a_plan_of_no_model(client: Client) -> None:
    response = client.get("/v1/models/cats/plan")
    assert (response.status_code, response.json()["code"]) == (404, "unknown_model")
