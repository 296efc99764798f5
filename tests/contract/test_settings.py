"""What is set for all models or one: policies, the least depth, the default budget; over HTTP."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from family.tree import format_path
from service.app import create_app
from service.settings import Settings
from tests.conftest import Trained
from tests.contract.conftest import Client
from training.dataset import Dataset

POLICIES = ["ladder-edf", "static(4-6)", "aimd(4-6)", "cheapest", "max-accuracy", "max-batch", "slackfit", "clockwork"]
IMAGE = [[0.5] * 28] * 28


def serving(trained: Trained, **settings: object) -> Iterator[Client]:
    with Client(create_app(Settings(models=trained.models, **settings))) as client:  # type: ignore[arg-type]
        yield client


@pytest.fixture(params=POLICIES)
def under_policy(trained: Trained, request: pytest.FixtureRequest) -> Iterator[Client]:
    yield from serving(trained, policy=request.param)


def test_every_policy_serves(under_policy: Client, client: Client, digits: Dataset, request: pytest.FixtureRequest) -> None:
    """Right answers (those of the other server), explicit paths obeyed, climbs, streams, budgets."""
    policy = request.node.callspec.params["under_policy"]
    inputs = [image.tolist() for image in digits.test.x[:5]]
    for entry in under_policy.get("/v1/models/digits").json()["paths"]:
        rows = under_policy.predict({"inputs": inputs, "path": entry["path"]}).json()["predictions"]
        others = client.predict({"inputs": inputs, "path": entry["path"]}).json()["predictions"]
        for row, other in zip(rows, others, strict=True):
            assert row.pop("confidence") == pytest.approx(other.pop("confidence"), abs=1e-5)
            assert row == other
    free = under_policy.predict({"inputs": inputs}).json()
    fixed = {"static(4-6)": "4-6", "aimd(4-6)": "4-6"}.get(policy)
    for row in free["predictions"]:
        again = client.predict({"inputs": [inputs[0]], "path": row["path"]})
        assert again.status_code == 200
        assert fixed in (None, row["path"])
        assert row["stopped_by"] in ("complete", "load")
    if policy in ("ladder-edf", "max-accuracy", "clockwork"):
        assert {row["stopped_by"] for row in free["predictions"]} == {"complete"}
    for row in under_policy.predict({"inputs": inputs, "min_confidence": 0}).json()["predictions"]:
        assert (row["depth"], row["stopped_by"]) == (1, "confidence")
    for row in under_policy.predict({"inputs": inputs, "min_confidence": 1}).json()["predictions"]:
        assert row["stopped_by"] == "complete"
    answer = under_policy.predict({"inputs": inputs, "latency_budget_ms": 10_000}).json()
    assert answer["deadline_met"] is True
    response = under_policy.predict({"inputs": inputs, "latency_budget_ms": 0.001, "strict": True})
    assert (response.status_code, response.json()["code"]) == (504, "deadline_infeasible")
    streamed = under_policy.request("POST", "/v1/models/digits/predict/stream", json={"inputs": inputs, "depth": 3})
    assert streamed.text.count('"final":true') == 5
    assert "event: end" in streamed.text
    assert under_policy.get("/v1/models/digits/plan").json()["policy"] == policy


@pytest.fixture(scope="module")
def deep(trained: Trained) -> Iterator[Client]:
    yield from serving(trained, min_depth=4)


def test_no_answer_is_shallower_than_the_least_depth(deep: Client, digits: Dataset) -> None:
    inputs = [image.tolist() for image in digits.test.x[:8]]
    for wish in (
        {},
        {"depth": "best"},
        {"depth": "full"},
        {"depth": 4},
        {"min_confidence": 0},
        {"min_confidence": 1},
        {"latency_budget_ms": 10_000},
        {"latency_budget_ms": 1},
        {"latency_budget_ms": 0.001},
        {"latency_budget_ms": 1, "min_confidence": 0.5},
    ):
        response = deep.predict({"inputs": inputs, **wish})
        if response.status_code == 504:
            assert response.json()["code"] == "deadline_expired"
            assert "latency_budget_ms" in wish
        else:
            assert min(row["depth"] for row in response.json()["predictions"]) >= 4, wish
    streamed = deep.request("POST", "/v1/models/digits/predict/stream", json={"inputs": inputs[:1]})
    assert all(f'"depth":{depth},' not in streamed.text for depth in (1, 2, 3))


def test_a_least_depth_shows_in_what_the_model_tells(deep: Client) -> None:
    detail = deep.get("/v1/models/digits").json()
    assert min(path["depth"] for path in detail["paths"]) == 4
    assert min(len(path.split("-")) for path in detail["climb"]) >= 4
    assert detail["risk_levels"] == []
    (row,) = deep.predict({"inputs": [IMAGE]}).json()["predictions"]
    assert (row["path"], row["stopped_by"]) == (detail["reference"], "complete")
    assert deep.get("/v1/models/digits/plan").json()["path"] == detail["reference"]


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"depth": 1}, "depth 1 is not offered: expected one of 4, 5, 6, 7, best or full"),
        ({"path": "4"}, "path 4 is not offered by this model"),
        ({"path": "4-6-7"}, "path 4-6-7 is not offered by this model"),
        ({"max_risk": 0.1}, "max_risk is certified for exits at 1 blocks, and this server answers with at least 4"),
    ],
)
def test_what_is_shallower_is_refused_and_says_what_is_offered(deep: Client, wish: dict[str, object], message: str) -> None:
    response = deep.predict({"inputs": [IMAGE], **wish})
    assert (response.status_code, response.json()["code"]) == (422, "not_offered")
    assert response.json()["error"] == message
    for offered in response.json()["offered"]:
        assert (len(offered.split("-")) if isinstance(offered, str) else offered) >= 4


def test_a_strict_budget_below_the_least_depth_is_refused(deep: Client) -> None:
    response = deep.predict({"inputs": [IMAGE], "latency_budget_ms": 0.001, "strict": True})
    assert (response.status_code, response.json()["code"]) == (504, "deadline_infeasible")
    assert response.json()["smallest_feasible_budget_ms"] > 0.001


def test_one_model_may_differ_from_the_others(trained: Trained) -> None:
    own = {"digits": {"policy": "static(2-4)", "default_latency_budget_ms": 9_000, "audit_rate": 0.5}}
    for client in serving(trained, per_model=own, policy="slackfit", default_latency_budget_ms=8_000):
        answer = client.predict({"inputs": [IMAGE]}).json()
        assert answer["predictions"][0]["path"] == "2-4"
        assert answer["deadline_met"] is True  # so it had a budget
        assert client.predict({"inputs": [IMAGE], "depth": 2}).json()["deadline_met"] is None
        assert client.get("/v1/models/digits/audits").json()["audit_rate"] == 0.5
        assert client.get("/v1/models/digits/plan").json()["policy"] == "static(2-4)"


@pytest.fixture(scope="module")
def unaudited(trained: Trained) -> Iterator[Client]:
    """A server that audits nothing by itself."""
    yield from serving(trained, audit_rate=0)


def test_audits_are_told_and_can_be_reset(unaudited: Client, trained: Trained) -> None:
    assert trained.manifest.certificate is not None
    told = unaudited.get("/v1/models/digits/audits").json()
    assert [level["epsilon"] for level in told["levels"]] == [x.epsilon for x in trained.manifest.certificate.levels]
    drift = unaudited.app.state.context.engine.drift(unaudited.app.state.context.repository.get("digits"))
    level = told["levels"][-1]["epsilon"]
    for _ in range(50):
        drift.observe(level, differs=True)
    told = unaudited.get("/v1/models/digits/audits").json()["levels"][-1]
    assert (told["audits"], told["disagreements"], told["alarm"]) == (50, 50, True)
    assert told["evidence"] >= 100
    assert unaudited.get("/health/ready").json() == {"ready": True, "drift_alarms": {"digits": [level]}}
    assert unaudited.get("/health/ready").status_code == 200
    assert f'hbll_drift_alarm{{epsilon="{level:g}",model="digits",version="1"}} 1.0' in unaudited.get("/metrics").text
    (row,) = unaudited.predict({"inputs": [IMAGE], "max_risk": level}).json()["predictions"]
    assert (row["path"], row["stopped_by"], row["certified"]) == (format_path(trained.manifest.reference), "complete", True)
    reset = unaudited.request("POST", "/v1/models/digits/audits/reset").json()
    assert [(each["audits"], each["alarm"]) for each in reset["levels"]] == [(0, False)] * len(reset["levels"])
    assert unaudited.get("/health/ready").json()["drift_alarms"] == {}
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert unaudited.request("POST", "/v1/models/digits/audits/reset", content=b"", headers=form).status_code == 415
    for method, url in (("GET", "/v1/models/cats/audits"), ("POST", "/v1/models/cats/audits/reset")):
        assert unaudited.request(method, url).json()["code"] == "unknown_model"


def test_collections_of_garbage_are_timed(client: Client) -> None:
    def count() -> float:
        (line,) = (x for x in client.get("/metrics").text.splitlines() if x.startswith("hbll_gc_pause_seconds_count"))
        return float(line.split()[-1])

    before = count()
    gc.collect()
    assert count() > before
