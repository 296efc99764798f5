"""A language model, from `hbll reproduce`'s run to answers: trained for a moment, exported, served, asked in every way."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import onnxruntime
import pytest
import torch
import tritonclient.http as triton
from click.testing import CliRunner

from family.manifest import load_manifest
from hbll.cli import main
from hbll.client import Client, InvalidRequest
from tests.conftest import LiveServer, start_server
from training.checkpoint import load_family
from training.config import TrainConfig
from training.experiments.experiment import run_trial
from training.experiments.language import TextTrial
from training.language import GptConfig
from training.loop import Recipe

WINDOW = list(b"if the ")


@dataclass(frozen=True)
class Served:
    run: Path
    bundle: Path
    server: LiveServer

    def post(self, url: str, **options: object) -> httpx.Response:
        return httpx.post(self.server.url + url, **options)


def hbll(*arguments: str) -> str:
    done = CliRunner().invoke(main, [*arguments])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("text")
    trial = TextTrial(
        name="gpt", folder=None, vocabulary=None, perplexity=False, column="c",
        model=GptConfig(context=len(WINDOW), width=8, heads=2),
        settings=TrainConfig(method="chains", nudge=0.0), recipe=Recipe(steps=20, batch=8, lr=0.02, seed=3),
    )  # fmt: skip
    run_trial(trial, folder)
    run, bundle = folder / "runs" / "gpt", folder / "models" / "text" / "1"
    hbll("export", str(run), str(bundle), "--paths", "4,4-6,4-6-7,1-2-3-4-5-6-7")
    with start_server(folder / "models", folder) as server:
        yield Served(run, bundle, server)


def _expected(served: Served, path: tuple[int, ...]) -> np.ndarray:
    """The probabilities of the next byte, by torch."""
    _, family, _ = load_family(served.run)
    temperature = load_manifest(served.bundle).offered[path].temperature
    with torch.no_grad():
        return torch.softmax(family(torch.tensor([WINDOW]), path) / temperature, dim=1)[0].numpy()


def test_every_path_is_a_graph_of_its_own_that_takes_tokens(served: Served) -> None:
    printed = hbll("verify", str(served.bundle), "--checkpoint", str(served.run))
    assert "4 paths agree in all forms" in " ".join(printed.split())
    _, family, _ = load_family(served.run)
    manifest = load_manifest(served.bundle)
    for path, entry in manifest.offered.items():
        session = onnxruntime.InferenceSession(str(served.bundle / entry.file))
        (x,) = session.get_inputs()
        assert (x.type, x.shape) == ("tensor(int64)", ["batch", len(WINDOW)])
        (logits,) = session.run(None, {"x": np.array([WINDOW])})
        with torch.no_grad():
            np.testing.assert_allclose(logits, family(torch.tensor([WINDOW]), path).numpy(), atol=1e-5)
    assert (manifest.vocabulary, len(manifest.labels), manifest.labels[10]) == (256, 256, "\\x0a")


def test_the_causal_mask_that_all_blocks_have_lies_in_the_weights_once(served: Served) -> None:
    _, family, _ = load_family(served.run)
    mask = family.blocks.bias.numpy().tobytes()  # type: ignore[operator, union-attr]
    assert (served.bundle / "weights.bin").read_bytes().count(mask) == 1


def test_what_is_not_independent_is_not_certified_and_all_work_is_counted(served: Served) -> None:
    manifest = load_manifest(served.bundle)
    assert manifest.certificate is None
    assert (manifest.provenance.seed, manifest.provenance.method) == (3, "chains")
    assert manifest.provenance.block_evaluations == 20 * round(3.5 * 8 * len(WINDOW))
    answer = served.post("/v1/models/text/predict", json={"inputs": [WINDOW], "max_risk": 0.1})
    assert answer.status_code == 422


def test_the_next_byte_is_the_same_in_every_form(served: Served) -> None:
    x = np.array([WINDOW], "<i8")
    tensor = {"tensor": base64.b64encode(x.tobytes()).decode(), "datatype": "INT64", "shape": [len(WINDOW)]}
    body = {"inputs": [WINDOW, tensor], "path": "4-6", "probabilities": True}
    predictions = served.post("/v1/models/text/predict", json=body).json()["predictions"]
    octets = {"content-type": "application/octet-stream"}
    url = "/v1/models/text/predict?path=4-6&probabilities=true"
    predictions += served.post(url, content=x.tobytes(), headers=octets).json()["predictions"]
    with Client(served.server.url) as client:
        assert client.model("text").input_datatype == "INT64"
        (by_client,) = client.predict(np.array(WINDOW), path="4-6", probabilities=True).predictions
        with pytest.raises(InvalidRequest, match="expected an array of tokens, whole numbers, got dtype float64"):
            client.predict(np.ones(len(WINDOW)))
    expected = _expected(served, (4, 6))
    for row in [row["probabilities"] for row in predictions] + [by_client.probabilities]:
        np.testing.assert_allclose(list(row.values()), expected, atol=1e-5)
    given = triton.InferInput("x", list(x.shape), "INT64").set_data_from_numpy(x)
    oip = triton.InferenceServerClient(served.server.url.removeprefix("http://"))
    answer = oip.infer("text", [given], outputs=[triton.InferRequestedOutput("probabilities")], parameters={"path": "4-6"})
    np.testing.assert_allclose(answer.as_numpy("probabilities")[0], expected, atol=1e-5)
    assert oip.get_model_metadata("text")["inputs"] == [{"name": "x", "datatype": "INT64", "shape": [-1, len(WINDOW)]}]
    oip.close()


@pytest.mark.parametrize(
    ("url", "body", "status", "message"),
    [
        ("/v1/models/text/predict", {"inputs": [[256] * 7]}, 422, "expected tokens between 0 and 255"),
        ("/v1/models/text/predict", {"inputs": [[0.5] * 7]}, 422, "expected tokens of shape [7]"),
        (
            "/v2/models/text/infer",
            {"inputs": [{"name": "x", "shape": [1, 7], "datatype": "INT64", "data": [-1] * 7}]},
            422,
            "expected tokens between 0 and 255",
        ),
        (
            "/v2/models/text/infer",
            {"inputs": [{"name": "x", "shape": [1, 7], "datatype": "FP32", "data": [1] * 7}]},
            400,
            "expected datatype INT64, got 'FP32'",
        ),
    ],
)
def test_what_is_no_token_is_refused(served: Served, url: str, body: object, status: int, message: str) -> None:
    answer = served.post(url, content=json.dumps(body), headers={"content-type": "application/json"})
    assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text


def test_a_run_of_text_is_evaluated_like_any_other(served: Served, tmp_path: Path) -> None:
    assert "text: 25 path(s), chains, seed 3" in hbll("evaluate", str(served.run), "--out", str(tmp_path)).replace(
        "\n", " "
    )
