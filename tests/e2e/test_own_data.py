"""docs/train.md, run as it stands: a table, modules of one's own and a folder of colour images, to answers of one server."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.live import free_port
from family.manifest import load_manifest
from tests.docs.page import Block, read_blocks, walked

PAGE = Path(__file__).parents[2] / "docs" / "train.md"
BLOCKS = read_blocks(PAGE.read_text(encoding="utf-8"))
FILES = {block.file: block.text for block in BLOCKS if block.file is not None}


@dataclass(frozen=True)
class Walked:
    """Where the page's blocks ran, what they printed, and the server that they started."""

    folder: Path
    url: str
    ran: list[tuple[Block, str]]

    @property
    def image(self) -> Path:
        return sorted((self.folder / "digits" / "digit-7").glob("*.png"))[0]

    def printed(self, part: str) -> str:
        """By the one block that has this part."""
        (text,) = (text for block, text in self.ran if part in block.text)
        return text

    def post(self, url: str, **options: object) -> dict[str, object]:
        response = httpx.post(self.url + url, **options)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walked]:
    folder, port = tmp_path_factory.mktemp("own"), str(free_port())
    replaced = {"8000": port, "hbll predict": f"hbll predict --url http://localhost:{port}"}
    with walked(PAGE, folder, replaced) as ran:
        yield Walked(folder, f"http://localhost:{port}", ran)


def test_each_way_is_less_than_forty_lines() -> None:
    assert set(FILES) == {"make_wine.py", "wine.toml", "ask_wine.py", "wine_own.py", "make_digits.py", "digits.toml"}
    assert len(FILES["wine_own.py"].splitlines()) < 40
    commands = next(block.text for block in BLOCKS if block.text.startswith("python make_digits.py"))
    assert len((FILES["digits.toml"] + commands).splitlines()) < 40


@pytest.mark.parametrize("name", ["wine", "wine-own"])
def test_curl_gets_a_wine_by_its_name(page: Walked, name: str) -> None:
    answer = json.loads(page.printed(f"models/{name}/predict"))
    (row,) = answer["predictions"]
    assert row["label"] == "cultivar 0"  # the second row of the table
    model = httpx.get(f"{page.url}/v1/models/{name}").json()
    assert model["features"] == [f"f{number}" for number in range(13)]
    assert model["labels"] == ["cultivar 0", "cultivar 1", "cultivar 2"]
    assert model["input_shape"] == [13]


def test_hbll_predict_finds_the_columns_of_a_table_by_name(page: Walked) -> None:
    answers = [json.loads(line) for line in (page.folder / "answers.jsonl").read_text().splitlines()]
    lines = (page.folder / "wine.csv").read_text().splitlines()[1:]
    assert [answer["row"] for answer in answers] == list(range(1, len(lines) + 1))
    right = [line.endswith(f",{answer['label']}") for line, answer in zip(lines, answers, strict=True)]
    assert np.mean(right) > 0.9


@pytest.mark.parametrize("name", ["wine", "wine-own"])
def test_the_table_is_answered_as_the_manifest_promises(page: Walked, name: str) -> None:
    """Plain numbers from the file, standardised inside the graphs: all rows, every wire format."""
    lines = (page.folder / "wine.csv").read_text().splitlines()[1:]
    rows = [[float(value) for value in line.split(",")[:-1]] for line in lines]
    labels = [line.split(",")[-1] for line in lines]
    x = np.array(rows, "<f4")
    nested = page.post(f"/v1/models/{name}/predict", json={"inputs": rows, "depth": "best"})
    got = [row["label"] for row in nested["predictions"]]
    assert np.mean([a == b for a, b in zip(got, labels, strict=True)]) > 0.9
    tensors = [{"tensor": base64.b64encode(row.tobytes()).decode(), "datatype": "FP32", "shape": [13]} for row in x]
    by_tensor = page.post(f"/v1/models/{name}/predict", json={"inputs": tensors, "depth": "best"})
    octets = {"content-type": "application/octet-stream"}
    raw = page.post(f"/v1/models/{name}/predict?depth=best", content=x.tobytes(), headers=octets)
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}
    oip = page.post(f"/v2/models/{name}/infer", json={"inputs": [tensor], "outputs": [{"name": "label"}]})
    assert [row["label"] for row in by_tensor["predictions"]] == [row["label"] for row in raw["predictions"]] == got
    assert oip["outputs"][0]["data"] == got


def test_python_gets_a_class_for_every_row_of_the_table(page: Walked) -> None:
    labels = [line.split(",")[-1] for line in (page.folder / "wine.csv").read_text().splitlines()[1:]]
    got = [line.rpartition(" ")[0] for line in page.printed("python ask_wine.py").split("\n") if line]
    assert np.mean([a == b for a, b in zip(got, labels, strict=True)]) > 0.9


def test_curl_and_hbll_predict_get_a_digit_by_its_folders_name(page: Walked) -> None:
    answer = json.loads(page.printed("models/colours/predict"))
    assert answer["predictions"][0]["label"].startswith("digit-")
    answers = re.findall(r"digit-\d", page.printed("hbll predict digits"))
    assert len(answers) == len(list((page.folder / "digits" / "digit-7").iterdir()))
    assert answers.count("digit-7") > 0.6 * len(answers)


def test_evaluate_writes_what_the_page_says(page: Walked) -> None:
    assert "Climbing until 90 % confident" in page.printed("hbll evaluate runs/colours")
    assert "Climbing until" in page.printed("hbll evaluate runs/wine")
    metrics = json.loads((page.folder / "runs" / "colours" / "metrics.json").read_text())
    assert metrics.keys() == {"2", "1-2", "2-3", "1-2-3"}
    assert metrics["1-2-3"]["flops"] > metrics["2"]["flops"] > 0
    for name in ("accuracy.png", "reliability.png", "tree.png"):
        assert (page.folder / "runs" / "colours" / name).read_bytes().startswith(b"\x89PNG")


def test_a_colour_image_is_the_same_in_every_form(page: Walked) -> None:
    with Image.open(page.image) as image:
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
    file = {"image": base64.b64encode(page.image.read_bytes()).decode()}
    tensor = {"tensor": base64.b64encode(pixels.tobytes()).decode(), "datatype": "FP32", "shape": [3, 28, 28]}
    body = {"inputs": [file, pixels.tolist(), tensor], "depth": "full", "probabilities": True}
    rows = page.post("/v1/models/colours/predict", json=body)["predictions"]
    octets = {"content-type": "application/octet-stream"}
    url = "/v1/models/colours/predict?depth=full&probabilities=true"
    rows += page.post(url, content=pixels.tobytes(), headers=octets)["predictions"]
    x = {"name": "x", "shape": [1, 3, 28, 28], "datatype": "FP32", "data": pixels.ravel().tolist()}
    asked = {"inputs": [x], "outputs": [{"name": "probabilities"}], "parameters": {"depth": "full"}}
    oip = page.post("/v2/models/colours/infer", json=asked)["outputs"][0]["data"]
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
def test_what_does_not_fit_is_refused(page: Walked, model: str, row: object, message: str) -> None:
    response = httpx.post(f"{page.url}/v1/models/{model}/predict", json={"inputs": [row]})
    assert response.status_code == 422
    assert message in response.json()["error"]


def test_the_manifest_says_what_goes_in_and_where_it_is_from(page: Walked) -> None:
    wine = load_manifest(page.folder / "models" / "wine" / "1")
    assert wine.provenance.dataset == "table wine.csv"
    assert wine.image is None
    assert wine.normalisation is not None
    assert len(wine.normalisation.mean) == 13
    colours = load_manifest(page.folder / "models" / "colours" / "1")
    assert colours.image is not None
    assert colours.image.row_shape == (3, 28, 28)
    assert colours.provenance.dataset == "images digits, 28 x 28"
    assert str(page.folder) not in (page.folder / "models" / "wine" / "1" / "manifest.json").read_text()
