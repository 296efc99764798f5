"""docs/train.md, run as it stands: a table with modules of its own and a folder of colour images, to answers of one server."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from family.manifest import load_manifest
from tests.conftest import LiveServer, start_server

PAGE = (Path(__file__).parents[2] / "docs" / "train.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w.]+)`:\n\n```(?:python|toml)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Walked:
    """Where the page's files and commands ran, and the server of what they made."""

    folder: Path
    server: LiveServer

    @property
    def image(self) -> Path:
        return sorted((self.folder / "digits" / "digit-7").glob("*.png"))[0]

    def shell(self, script: str) -> str:
        return _shell(script.replace("localhost:8000", self.server.url.removeprefix("http://")), self.folder)

    def post(self, url: str, **options: object) -> dict[str, object]:
        response = httpx.post(self.server.url + url, **options)
        assert response.status_code == 200, response.text
        return response.json()


def _shell(script: str, folder: Path) -> str:
    """Run a script with our own `python` and `hbll`."""
    prelude = f'python() {{ "{sys.executable}" "$@"; }}\nhbll() {{ python -m hbll "$@"; }}\nset -e\n'
    done = subprocess.run(
        ["bash", "-c", prelude + script], capture_output=True, text=True, check=False, cwd=folder, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walked]:
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        for name, content in FILES.items():
            (folder / name).write_text(content)
        for script in COMMANDS:
            if script.startswith("python "):
                _shell(script, folder)
        server = start_server(folder / "models", folder)
        yield Walked(folder, server)
    server.stop()


def test_each_way_is_less_than_forty_lines() -> None:
    assert set(FILES) == {"make_wine.py", "wine.py", "make_digits.py", "digits.toml"}
    assert len(FILES["wine.py"].splitlines()) < 40
    commands = next(script for script in COMMANDS if script.startswith("python make_digits.py"))
    assert len((FILES["digits.toml"] + commands).splitlines()) < 40


def test_curl_gets_a_wine_by_its_name(walked: Walked) -> None:
    answer = json.loads(walked.shell(next(script for script in COMMANDS if "models/wine/predict" in script)))
    (row,) = answer["predictions"]
    assert row["label"] == "cultivar 0"  # the second row of the table
    model = httpx.get(f"{walked.server.url}/v1/models/wine").json()
    assert model["features"] == [f"f{number}" for number in range(13)]
    assert model["labels"] == ["cultivar 0", "cultivar 1", "cultivar 2"]
    assert model["input_shape"] == [13]


def test_the_table_is_answered_as_the_manifest_promises(walked: Walked) -> None:
    """Plain numbers from the file, standardised inside the graphs: all rows, every wire format."""
    lines = (walked.folder / "wine.csv").read_text().splitlines()[1:]
    rows = [[float(value) for value in line.split(",")[:-1]] for line in lines]
    labels = [line.split(",")[-1] for line in lines]
    x = np.array(rows, "<f4")
    nested = walked.post("/v1/models/wine/predict", json={"inputs": rows, "depth": "best"})
    got = [row["label"] for row in nested["predictions"]]
    assert np.mean([a == b for a, b in zip(got, labels, strict=True)]) > 0.9
    tensors = [{"tensor": base64.b64encode(row.tobytes()).decode(), "datatype": "FP32", "shape": [13]} for row in x]
    by_tensor = walked.post("/v1/models/wine/predict", json={"inputs": tensors, "depth": "best"})
    octets = {"content-type": "application/octet-stream"}
    raw = walked.post("/v1/models/wine/predict?depth=best", content=x.tobytes(), headers=octets)
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}
    oip = walked.post("/v2/models/wine/infer", json={"inputs": [tensor], "outputs": [{"name": "label"}]})
    assert [row["label"] for row in by_tensor["predictions"]] == [row["label"] for row in raw["predictions"]] == got
    assert oip["outputs"][0]["data"] == got


def test_curl_and_hbll_predict_get_a_digit_by_its_folders_name(walked: Walked) -> None:
    answer = json.loads(walked.shell(next(script for script in COMMANDS if "models/colours/predict" in script)))
    assert answer["predictions"][0]["label"].startswith("digit-")
    script = next(script for script in COMMANDS if script.startswith("hbll predict"))
    table = walked.shell(script.replace("--model", f"--url {walked.server.url} --model"))
    answers = re.findall(r"digit-\d", table)
    assert len(answers) == len(list((walked.folder / "digits" / "digit-7").iterdir()))
    assert answers.count("digit-7") > 0.6 * len(answers)


def test_evaluate_writes_what_the_page_says(walked: Walked) -> None:
    printed = walked.shell(next(script for script in COMMANDS if script.startswith("hbll evaluate")))
    assert "Climbing until 90 % confident" in printed
    metrics = json.loads((walked.folder / "runs" / "colours" / "metrics.json").read_text())
    assert metrics.keys() == {"2", "1-2", "2-3", "1-2-3"}
    assert metrics["1-2-3"]["flops"] > metrics["2"]["flops"] > 0
    for name in ("accuracy.png", "reliability.png", "tree.png"):
        assert (walked.folder / "runs" / "colours" / name).read_bytes().startswith(b"\x89PNG")


def test_a_colour_image_is_the_same_in_every_form(walked: Walked) -> None:
    with Image.open(walked.image) as image:
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
    file = {"image": base64.b64encode(walked.image.read_bytes()).decode()}
    tensor = {"tensor": base64.b64encode(pixels.tobytes()).decode(), "datatype": "FP32", "shape": [3, 28, 28]}
    body = {"inputs": [file, pixels.tolist(), tensor], "depth": "full", "probabilities": True}
    rows = walked.post("/v1/models/colours/predict", json=body)["predictions"]
    octets = {"content-type": "application/octet-stream"}
    url = "/v1/models/colours/predict?depth=full&probabilities=true"
    rows += walked.post(url, content=pixels.tobytes(), headers=octets)["predictions"]
    x = {"name": "x", "shape": [1, 3, 28, 28], "datatype": "FP32", "data": pixels.ravel().tolist()}
    asked = {"inputs": [x], "outputs": [{"name": "probabilities"}], "parameters": {"depth": "full"}}
    oip = walked.post("/v2/models/colours/infer", json=asked)["outputs"][0]["data"]
    expected = list(rows[0]["probabilities"].values())
    for row in rows:
        assert list(row["probabilities"].values()) == pytest.approx(expected, abs=1e-5)
    assert oip == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("model", "row", "message"),
    [
        ("wine", {"image": "AAAA"}, "this model does not take images, but arrays of shape [13]"),
        ("wine", [1.0] * 12, "expected numbers of shape [13], got shape [12, ...]"),
        ("colours", [[[0.0] * 28] * 28], "expected numbers of shape [3, 28, 28], got shape [1, ...]"),
        ("colours", [[[2.0] * 28] * 28] * 3, "expected pixels between 0 (black) and 1 (white)"),
    ],
)
def test_what_does_not_fit_is_refused(walked: Walked, model: str, row: object, message: str) -> None:
    response = httpx.post(f"{walked.server.url}/v1/models/{model}/predict", json={"inputs": [row]})
    assert response.status_code == 422
    assert message in response.json()["error"]


def test_the_manifest_says_what_goes_in_and_where_it_is_from(walked: Walked) -> None:
    wine = load_manifest(walked.folder / "models" / "wine" / "1")
    assert wine.provenance.dataset == "table wine.csv"
    assert wine.image is None
    assert wine.normalisation is not None
    assert len(wine.normalisation.mean) == 13
    colours = load_manifest(walked.folder / "models" / "colours" / "1")
    assert colours.image is not None
    assert colours.image.row_shape == (3, 28, 28)
    assert colours.provenance.dataset == "images digits, 28 x 28"
    assert str(walked.folder) not in (walked.folder / "models" / "wine" / "1" / "manifest.json").read_text()
