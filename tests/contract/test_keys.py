"""Who may ask what, with API keys; request ids; the access log."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from service.app import create_app
from service.keyring import add_key
from service.keys import OPEN_PATHS
from service.settings import Settings
from tests.conftest import Trained
from tests.contract.conftest import Client

IMAGE = [[0.5] * 28] * 28
PREDICT = "/v1/models/digits/predict"


@dataclass(frozen=True)
class Guarded:
    """A server with keys, and their tokens by name."""

    client: Client
    tokens: dict[str, str]

    def ask(self, method: str, url: str, key: str | None = None, **options: object) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.tokens[key]}"} if key is not None else {}
        return self.client.request(method, url, headers=headers | options.pop("headers", {}), **options)


@pytest.fixture(scope="module")
def guarded(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    tokens = {
        "alice": add_key(file, "alice", rate=None, admin=False),
        "few": add_key(file, "few", rate="2/hour", admin=False),
        "operator": add_key(file, "operator", rate=None, admin=True),
    }
    app = create_app(Settings(models=trained.models, keys_file=file, metrics_need_key=True, access_log=True))
    with Client(app) as client:
        yield Guarded(client, tokens)


def test_everything_but_probes_and_the_description_needs_a_key(guarded: Guarded) -> None:
    for path, operations in guarded.client.get("/openapi.json").json()["paths"].items():
        url = path.replace("{model}", "digits").replace("{version}", "1")
        for method in operations:
            response = guarded.ask(method.upper(), url)
            if path in OPEN_PATHS:
                assert response.status_code == 200
                continue
            assert response.status_code == 401, (method, path)
            assert response.json()["code"] == "unauthorized"
            assert response.headers["www-authenticate"] == 'Bearer realm="hbll"'
    assert guarded.client.get("/nowhere").status_code == 401
    assert guarded.ask("GET", "/nowhere", "alice").status_code == 404


def test_a_key_opens_both_protocols_as_either_header(guarded: Guarded) -> None:
    assert guarded.ask("POST", PREDICT, "alice", json={"inputs": [IMAGE]}).status_code == 200
    assert guarded.ask("GET", "/v2/models/digits", "alice").status_code == 200
    assert guarded.ask("GET", "/metrics", "alice").status_code == 200
    assert guarded.ask("GET", "/v1/models", headers={"x-api-key": guarded.tokens["alice"]}).status_code == 200
    assert guarded.ask("GET", "/v1/models", headers={"x-api-key": guarded.tokens["alice"] + "x"}).status_code == 401
    response = guarded.ask("GET", "/v1/models", headers={"authorization": "Bearer wrong"})
    assert (response.status_code, response.json()["error"]) == (401, "this API key is not known here")


def test_without_a_key_no_body_is_read(guarded: Guarded) -> None:
    """A body that would be refused as such is refused for want of a key."""
    assert guarded.ask("POST", PREDICT, content=b"{" * 10_000_000).status_code == 401


def test_metrics_are_open_by_default(client: Client, trained: Trained, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    add_key(file, "alice", rate=None, admin=False)
    with Client(create_app(Settings(models=trained.models, keys_file=file))) as other:
        assert other.get("/metrics").status_code == 200
        assert other.get("/v1/models").status_code == 401


@pytest.mark.parametrize(
    "url",
    [
        "/v1/models/digits/audits/reset",
        "/v2/repository/models/digits/unload",
        "/v2/repository/models/digits/load",  # again
    ],
)
def test_what_changes_the_server_needs_an_operators_key(guarded: Guarded, url: str) -> None:
    response = guarded.ask("POST", url, "alice")
    assert (response.status_code, response.json()["code"]) == (403, "forbidden")
    assert "'alice' is not an operator's: expected one with admin = true" in response.json()["error"]
    assert guarded.ask("POST", url, "operator").status_code == 200


def test_without_keys_everybody_is_an_operator(client: Client) -> None:
    assert client.request("POST", "/v1/models/digits/audits/reset").status_code == 200


def test_over_its_rate_a_key_is_told_when_to_come_back(guarded: Guarded) -> None:
    assert [guarded.ask("GET", "/v1/models", "few").status_code for _ in range(2)] == [200, 200]
    response = guarded.ask("GET", "/v1/models", "few")
    assert (response.status_code, response.json()["code"]) == (429, "rate_limited")
    assert 3500 < int(response.headers["retry-after"]) <= 3600
    assert guarded.ask("GET", "/v1/models", "alice").status_code == 200
    assert 'hbll_refusals_total{code="rate_limited"} 1.0' in guarded.ask("GET", "/metrics", "alice").text


@pytest.mark.parametrize("given", ["abc-123", "0af7651916cd43dd8448eb211c80319c", "a/b:c=d@e+f._-", "x" * 128])
def test_a_sane_request_id_comes_back(client: Client, given: str) -> None:
    for url in ("/health/live", "/v1/models/cats", "/nowhere"):
        assert client.request("GET", url, headers={"x-request-id": given}).headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", [None, "", "two words", "x" * 129, "é", '"', "<script>", "a\tb"])
def test_else_the_request_gets_one(client: Client, given: str | None) -> None:
    headers = {} if given is None else {"x-request-id": given.encode("latin-1")}
    ids = [client.request("GET", "/health/live", headers=headers).headers["x-request-id"] for _ in range(2)]
    assert all(len(each) == 32 and int(each, 16) >= 0 for each in ids)
    assert ids[0] != ids[1]


def test_every_answer_has_a_request_id(client: Client, guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    json_header = {"content-type": "application/json", "x-request-id": "mine"}
    answers = [
        client.request("POST", PREDICT, content=b"{", headers=json_header),
        client.request("POST", PREDICT, content=b"{", headers=json_header | {"content-type": "text/plain"}),
        client.request("POST", PREDICT, content=b" " * 500_000, headers=json_header),
        client.request("DELETE", PREDICT, headers=json_header),
        client.request("POST", f"{PREDICT}/stream", json={"inputs": [IMAGE]}, headers=json_header),
        guarded.client.request("GET", "/v1/models", headers=json_header),
    ]
    assert [answer.status_code for answer in answers] == [400, 415, 413, 405, 200, 401]
    monkeypatch.setattr("service.call.resolve_wish", None)
    answers.append(client.request("POST", PREDICT, json={"inputs": [IMAGE]}, headers=json_header))
    assert (answers[-1].status_code, answers[-1].json()["code"]) == (500, "internal")
    assert [answer.headers.get_list("x-request-id") for answer in answers] == [["mine"]] * len(answers)


def test_the_access_log_tells_who_asked_what_and_what_came_of_it(guarded: Guarded, lines: list[logging.LogRecord]) -> None:
    secret = "what nobody may read"
    url = f"{PREDICT}?latency_budget_ms=10000"
    options = {"json": {"inputs": [IMAGE, IMAGE], "depth": 3}, "headers": {"x-request-id": "mine"}}
    answer = guarded.ask("POST", PREDICT, "alice", **options)
    guarded.ask("POST", url, "alice", content=bytes(4 * 784), headers={"content-type": "application/octet-stream"})
    guarded.ask("POST", f"{PREDICT}/stream", "operator", json={"inputs": [IMAGE], "min_confidence": 1})
    tensor = {"name": "x", "shape": [1, 28, 28], "datatype": "FP32", "data": [IMAGE]}
    guarded.ask("POST", "/v2/models/digits/infer", "alice", json={"inputs": [tensor], "parameters": {"path": "4-6"}})
    guarded.ask("POST", "/v1/models/cats/predict", "alice", json={"inputs": [secret]})
    guarded.ask("GET", f"/v1/models?{secret}", headers={"authorization": f"Bearer {secret}"})
    guarded.ask("GET", f"/{secret}", "alice")
    fields = ("method", "route", "status", "model", "key", "depth", "stopped_by", "deadline_met")
    infer = "/v2/models/{model}/infer"
    predict = "/v1/models/{model}/predict"
    assert [tuple(getattr(record, field) for field in fields) for record in lines] == [
        ("POST", predict, 200, "digits", "alice", 3, "depth", None),
        ("POST", predict, 200, "digits", "alice", lines[1].depth, "complete", True),
        ("POST", f"{predict}/stream", 200, "digits", "operator", lines[2].depth, "complete", None),
        ("POST", infer, 200, "digits", "alice", 2, "path", None),
        ("POST", predict, 404, "cats", "alice", None, None, None),
        ("GET", None, 401, None, None, None, None, None),
        ("GET", None, 404, None, "alice", None, None, None),
    ]
    first = lines[0]
    assert first.request_id == "mine"
    assert first.duration_ms > 0
    assert (first.bytes_in, first.bytes_out) == (int(answer.request.headers["content-length"]), len(answer.content))
    for record in lines:
        told = json.dumps(vars(record), default=str)
        assert secret not in told
        assert not any(token in told for token in guarded.tokens.values())


def test_without_the_access_log_nothing_is_logged(client: Client, lines: list[logging.LogRecord]) -> None:
    assert client.predict({"inputs": [IMAGE]}).status_code == 200
    assert lines == []
