"""Raw bodies: a tensor and nothing else, wishes in the query."""

from __future__ import annotations

import gzip

import httpx
import numpy as np
import pytest

from tests.conftest import Trained
from tests.contract.conftest import Client
from training.dataset import Dataset

URL = "/v1/models/digits/predict"
ROW = np.full((28, 28), 0.5, "<f4").tobytes()


def send(client: Client, body: bytes, query: str = "", **headers: str) -> httpx.Response:
    headers = {"content-type": "application/octet-stream"} | {name.replace("_", "-"): v for name, v in headers.items()}
    return client.request("POST", f"{URL}?{query}" if query else URL, content=body, headers=headers)


def rows_of(response: httpx.Response) -> list[dict[str, object]]:
    assert response.status_code == 200, response.text
    return response.json()["predictions"]


@pytest.fixture(scope="module")
def images(digits: Dataset) -> np.ndarray:
    return digits.test.x[:6].numpy()


@pytest.mark.parametrize(
    ("query", "wish"),
    [
        ("", {}),
        ("depth=2", {"depth": 2}),
        ("depth=best&strict=false", {"depth": "best"}),
        ("path=4-6-7", {"path": "4-6-7"}),
        ("min_confidence=0.6", {"min_confidence": 0.6}),
        ("min_confidence=0.6&latency_budget_ms=10000", {"min_confidence": 0.6, "latency_budget_ms": 10_000}),
        ("latency_budget_ms=1e4&strict=true", {"latency_budget_ms": 10_000, "strict": True}),
        ("probabilities=true&depth=1", {"probabilities": True, "depth": 1}),
    ],
)
def test_the_answer_is_that_of_json(client: Client, images: np.ndarray, query: str, wish: dict[str, object]) -> None:
    raw = send(client, images.astype("<f4").tobytes(), query)
    json = client.predict({"inputs": images.tolist(), **wish})
    for row, other in zip(rows_of(raw), rows_of(json), strict=True):
        assert row.pop("confidence") == pytest.approx(other.pop("confidence"), abs=1e-5)
        probabilities, others = row.pop("probabilities"), other.pop("probabilities")
        assert (probabilities is None) == (others is None)
        if probabilities is not None:
            assert probabilities == pytest.approx(others, abs=1e-5)
        assert row == other
    assert raw.json()["deadline_met"] == json.json()["deadline_met"]
    assert set(raw.json()) == set(json.json())


def test_a_certified_risk_in_the_query(client: Client, trained: Trained) -> None:
    assert trained.manifest.certificate is not None
    level = trained.manifest.certificate.levels[-1]
    response = send(client, ROW, f"max_risk={level.epsilon}")
    assert rows_of(response)[0]["certified"] is True
    assert response.json()["risk"]["epsilon"] == level.epsilon


def test_wishes_may_come_as_headers_and_the_query_wins(client: Client) -> None:
    assert rows_of(send(client, ROW, x_depth="3"))[0]["depth"] == 3
    assert rows_of(send(client, ROW, "depth=2", x_depth="3"))[0]["depth"] == 2
    assert send(client, ROW, "depth=2", x_latency_budget_ms="10000").json()["deadline_met"] is True


def test_a_compressed_body_is_read(client: Client) -> None:
    assert len(rows_of(send(client, gzip.compress(ROW * 3), content_encoding="gzip"))) == 3


@pytest.mark.parametrize(
    ("body", "query", "status", "message"),
    [
        (b"", "", 422, "expected 1 to 40 rows of 3136 bytes, FP32 of shape [28, 28], got 0 bytes"),
        (ROW[:-1], "", 422, "got 3135 bytes"),
        (ROW + b"\0\0\0\0", "", 422, "got 3140 bytes"),
        (ROW * 41, "", 422, "expected 1 to 40 rows"),
        (np.full((28, 28), np.nan, "<f4").tobytes(), "", 422, "the body[0]: expected finite numbers, got NaN or infinity"),
        (ROW + np.full((28, 28), np.inf, "<f4").tobytes(), "", 422, "the body[1]: expected finite numbers"),
        (np.full((28, 28), 255, "<f4").tobytes(), "", 422, "the body: expected pixels between 0 (black) and 1 (white)"),
        (ROW * 200, "", 413, "expected a body of at most 400000 bytes"),
        (ROW, "dept=2", 422, "query: expected some of depth, path, latency_budget_ms"),
        (ROW, "depth=2&depth=2", 422, "query depth: expected one, got several"),
        (ROW, "depth=deep", 422, "depth"),
        (ROW, "depth=9", 422, "depth 9 is not offered"),
        (ROW, "depth", 422, "depth"),
        (ROW, "path=4-7", 422, "4 -> 7 is no hop"),
        (ROW, "latency_budget_ms=soon", 422, "query latency_budget_ms: expected a number, got 'soon'"),
        (ROW, "latency_budget_ms=nan", 422, "expected a number, got 'nan'"),
        (ROW, "latency_budget_ms=-1", 422, "latency_budget_ms: Input should be greater than 0"),
        (ROW, "min_confidence=2", 422, "min_confidence: Input should be less than or equal to 1"),
        (ROW, "max_risk=0.0123", 422, "max_risk 0.0123 is not certified"),
        (ROW, "strict=perhaps", 422, "query strict: expected true or false, got 'perhaps'"),
        (ROW, "depth=1&path=4", 422, "give only one of depth, path, min_confidence and max_risk"),
        (ROW, "%ff=%fe", 422, "query: expected some of"),
        (ROW, "latency_budget_ms=0.0001&strict=1", 504, "cannot be met now"),
    ],
)
def test_what_is_wrong_is_named_in_the_one_shape(
    client: Client, body: bytes, query: str, status: int, message: str
) -> None:
    response = send(client, body, query)
    assert response.status_code == status, response.text
    assert set(response.json()) >= {"error", "code"}
    assert message in response.json()["error"]


def test_an_unknown_model_and_another_method(client: Client) -> None:
    headers = {"content-type": "application/octet-stream"}
    response = client.request("POST", "/v1/models/cats/predict", content=ROW, headers=headers)
    assert (response.status_code, response.json()["code"]) == (404, "unknown_model")
    response = client.request("GET", URL, headers=headers)
    assert (response.status_code, response.json()["code"]) == (405, "method_not_allowed")


def test_a_stream_takes_no_raw_body(client: Client) -> None:
    response = client.request("POST", f"{URL}/stream", content=ROW, headers={"content-type": "application/octet-stream"})
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")
    assert response.json()["error"] == "expected Content-Type application/json, got 'application/octet-stream'"


@pytest.mark.parametrize("url", [URL, f"{URL}/stream"])
def test_the_query_is_for_raw_bodies_alone(client: Client, url: str) -> None:
    """A wish there is not passed over; what else stands there is nobody's."""
    body = {"inputs": [[[0.5] * 28] * 28], "depth": 3}
    response = client.request("POST", f"{url}?depth=2", json=body)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_input")
    assert response.json()["error"].startswith(
        "query depth: only raw bodies take wishes in the query; put depth into the JSON"
    )
    assert client.request("POST", f"{url}?nonsense", json=body).status_code == 200
