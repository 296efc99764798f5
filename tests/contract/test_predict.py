from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from family.tree import format_path
from tests.conftest import Trained
from tests.contract.conftest import Client
from training.checkpoint import load_family
from training.dataset import Dataset


def png(pixels: np.ndarray, **options: object) -> str:
    file = io.BytesIO()
    Image.fromarray((pixels * 255).round().astype(np.uint8)).save(file, "PNG", **options)
    return base64.b64encode(file.getvalue()).decode()


def tensor(pixels: np.ndarray) -> dict[str, object]:
    data = base64.b64encode(pixels.astype("<f4").tobytes()).decode()
    return {"tensor": data, "datatype": "FP32", "shape": list(pixels.shape)}


@pytest.fixture(scope="module")
def images(digits: Dataset) -> np.ndarray:
    return digits.test.x[:8].numpy()


def test_answers_are_the_trained_models(client: Client, trained: Trained, images: np.ndarray) -> None:
    """Every path, through HTTP and the gated graph: temperature-scaled softmax of what torch computes."""
    _, family, _ = load_family(trained.run)
    for path, entry in trained.manifest.offered.items():
        answer = client.predict(
            {"inputs": [tensor(image) for image in images], "path": entry.path, "probabilities": True}
        ).json()
        with torch.no_grad():
            expected = (family(torch.from_numpy(images), path) / entry.temperature).softmax(dim=1).numpy()
        got = np.array([list(row["probabilities"].values()) for row in answer["predictions"]])
        np.testing.assert_allclose(got, expected, atol=1e-5)
        for row, probabilities in zip(answer["predictions"], expected, strict=True):
            assert row["label"] == str(probabilities.argmax())
            assert row["confidence"] == pytest.approx(probabilities.max(), abs=1e-5)
            assert (row["path"], row["depth"], row["stopped_by"]) == (entry.path, len(path), "path")


def test_all_forms_of_an_input_give_one_answer(client: Client, images: np.ndarray) -> None:
    pixels = (images[0] * 255).round() / 255
    forms = [pixels.tolist(), tensor(pixels.astype(np.float32)), {"image": png(pixels)}]
    rows = client.predict({"inputs": forms, "probabilities": True}).json()["predictions"]
    for row in rows[1:]:
        assert row["probabilities"] == pytest.approx(rows[0]["probabilities"], abs=1e-5)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_images_of_any_usual_kind_size_and_mode_are_taken(client: Client, images: np.ndarray, kind: str) -> None:
    picture = Image.fromarray((images[0] * 255).astype(np.uint8)).resize((200, 160)).convert("RGB")
    file = io.BytesIO()
    picture.save(file, kind)
    answer = client.predict({"inputs": [{"image": base64.b64encode(file.getvalue()).decode()}]})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("depth", range(1, 8))
def test_depth_runs_the_best_path_of_that_depth(client: Client, trained: Trained, images: np.ndarray, depth: int) -> None:
    (row,) = client.predict({"inputs": [images[0].tolist()], "depth": depth}).json()["predictions"]
    assert row["path"] == format_path(trained.manifest.best_by_depth[depth])
    assert (row["depth"], row["stopped_by"]) == (depth, "depth")


def test_best_full_and_no_wish(client: Client, trained: Trained, images: np.ndarray) -> None:
    reference = format_path(trained.manifest.reference)
    for wish, path, reason in (
        ({"depth": "best"}, reference, "depth"),
        ({"depth": "full"}, "1-2-3-4-5-6-7", "depth"),
        ({}, reference, "complete"),
    ):
        (row,) = client.predict({"inputs": [images[0].tolist()], **wish}).json()["predictions"]
        assert (row["path"], row["stopped_by"]) == (path, reason)


def test_a_roomy_budget_is_met_by_the_reference_path(client: Client, trained: Trained, images: np.ndarray) -> None:
    answer = client.predict({"inputs": [images[0].tolist()], "latency_budget_ms": 10_000}).json()
    assert answer["deadline_met"] is True
    assert answer["predictions"][0]["path"] == format_path(trained.manifest.reference)
    assert answer["predictions"][0]["stopped_by"] == "complete"
    assert answer["queue_ms"] + answer["compute_ms"] <= answer["total_ms"] <= 10_000


def test_a_budget_that_cannot_be_met_is_told(client: Client, images: np.ndarray) -> None:
    """Either it expired before any block had run, or the shallowest path ran, late."""
    answer = client.predict({"inputs": [images[0].tolist()], "latency_budget_ms": 0.001})
    if answer.status_code == 504:
        assert answer.json()["code"] == "deadline_expired"
    else:
        assert answer.json()["deadline_met"] is False
        assert answer.json()["predictions"][0]["depth"] == 1


def test_no_budget_no_verdict(client: Client, images: np.ndarray) -> None:
    assert client.predict({"inputs": [images[0].tolist()]}).json()["deadline_met"] is None


def test_confidence_targets_go_as_deep_as_needed(client: Client, images: np.ndarray) -> None:
    inputs = [image.tolist() for image in images]
    lax = client.predict({"inputs": inputs, "min_confidence": 0}).json()["predictions"]
    assert {(row["depth"], row["stopped_by"]) for row in lax} == {(1, "confidence")}
    strict = client.predict({"inputs": inputs, "min_confidence": 1}).json()["predictions"]
    climb = client.get("/v1/models/digits").json()["climb"]
    assert {(row["path"], row["stopped_by"]) for row in strict} == {(climb[-1], "complete")}
    between = client.predict({"inputs": inputs, "min_confidence": 0.5}).json()["predictions"]
    for row in between:
        assert row["path"] in climb
        assert row["stopped_by"] == ("confidence" if row["confidence"] >= 0.5 else "complete")


def test_probabilities_come_only_when_asked(client: Client, images: np.ndarray) -> None:
    inputs = [images[0].tolist()]
    assert client.predict({"inputs": inputs}).json()["predictions"][0]["probabilities"] is None
    (row,) = client.predict({"inputs": inputs, "probabilities": True}).json()["predictions"]
    assert list(row["probabilities"]) == [str(digit) for digit in range(10)]
    assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_more_rows_than_a_batch_come_back_in_order(client: Client, digits: Dataset) -> None:
    images = digits.test.x[:40].numpy()
    together = client.predict({"inputs": [tensor(image) for image in images], "depth": 1}).json()["predictions"]
    for image, row in zip(images, together, strict=True):
        (alone,) = client.predict({"inputs": [tensor(image)], "depth": 1}).json()["predictions"]
        assert alone["label"] == row["label"]
        assert alone["confidence"] == pytest.approx(row["confidence"], abs=1e-5)


def test_a_certified_risk_climbs_to_its_threshold_and_says_what_holds(
    client: Client, trained: Trained, images: np.ndarray
) -> None:
    certificate = trained.manifest.certificate
    assert certificate is not None
    detail = client.get("/v1/models/digits").json()
    assert detail["risk_levels"] == [level.epsilon for level in certificate.levels]
    inputs = [tensor(image) for image in images]
    for level in certificate.levels:
        answer = client.predict({"inputs": inputs, "max_risk": level.epsilon}).json()
        assert answer["risk"] == {"epsilon": level.epsilon, "delta": certificate.delta}
        same = client.predict({"inputs": inputs, "min_confidence": level.threshold}).json()
        for row, other in zip(answer["predictions"], same["predictions"], strict=True):
            assert row["path"] == other["path"]
            assert row["certified"] is True
            assert row["stopped_by"] == {"confidence": "risk", "complete": "complete"}[other["stopped_by"]]
            assert other["certified"] is None
        assert same["risk"] is None


def test_wishes_may_come_as_headers_and_the_body_wins(client: Client, images: np.ndarray) -> None:
    def ask(headers: dict[str, str], **wishes: object) -> dict[str, object]:
        body = {"inputs": [images[0].tolist()], **wishes}
        response = client.request("POST", "/v1/models/digits/predict", json=body, headers=headers)
        assert response.status_code == 200, response.text
        return response.json()

    answer = ask({"X-Depth": "3", "X-Latency-Budget-Ms": "10000"})
    assert (answer["predictions"][0]["depth"], answer["deadline_met"]) == (3, True)
    assert ask({"X-Depth": "3"}, depth=2)["predictions"][0]["depth"] == 2
    assert ask({"X-Depth": "3"}, min_confidence=0)["predictions"][0]["stopped_by"] == "confidence"
    response = client.request(
        "POST", "/v1/models/digits/predict", json={"inputs": [images[0].tolist()]}, headers={"X-Depth": "9"}
    )
    assert (response.status_code, response.json()["code"]) == (422, "not_offered")
