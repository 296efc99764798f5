"""schemathesis asks a real server for all that openapi.yaml has, with valid and invalid data."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from tests.conftest import LiveServer, Trained, start_server

DOCUMENT = Path(__file__).parents[2] / "openapi.yaml"
CONFIG = Path(__file__).with_name("schemathesis.toml")
UNLOAD = "/v2/repository/models/{model}/unload"
NAMES = f"""
[parameters]
"path.model" = "digits"
"path.version" = "1"

[[operations]]
include-path = "{UNLOAD}"
parameters = {{ "path.model" = "spare" }}
"""


@pytest.fixture(scope="module")
def own_server(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Not the shared one: statistics and audits of that are other tests'. It has a second model, which is unloaded."""
    folder = tmp_path_factory.mktemp("schemathesis")
    for name in ("digits", "spare"):
        (folder / "models" / name).mkdir(parents=True)
        (folder / "models" / name / "1").symlink_to(trained.bundle)
    with start_server(folder / "models", folder) as live:
        yield live


def test_every_operation_answers_the_model_as_documented(own_server: LiveServer, tmp_path: Path) -> None:
    document = with_real_rows(yaml.safe_load(DOCUMENT.read_text(encoding="utf-8")))
    operations = {
        (method.upper(), path.format(model="spare" if path == UNLOAD else "digits", version="1"))
        for path, methods in document["paths"].items()
        for method in methods
    }
    asked = ask(own_server, document, CONFIG.read_text(encoding="utf-8") + NAMES, tmp_path)
    assert operations - {request for request, status in asked if status == 200} == set()


def test_every_operation_answers_any_name_as_documented(own_server: LiveServer, tmp_path: Path) -> None:
    document = yaml.safe_load(DOCUMENT.read_text(encoding="utf-8"))
    asked = ask(own_server, document, CONFIG.read_text(encoding="utf-8"), tmp_path)
    assert 404 in {status for _, status in asked}


def ask(server: LiveServer, document: dict, config: str, folder: Path) -> set[tuple[tuple[str, str], int]]:
    """Run schemathesis, which must find nothing; returns method and path, and status, of what was asked."""
    (folder / "schemathesis.toml").write_text(config, encoding="utf-8")
    (folder / "openapi.json").write_text(json.dumps(document), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("schemathesis")), "--no-color", "--config-file", "schemathesis.toml"]
    command += ["run", "openapi.json", "--url", server.url, "--report", "har", "--report-har-path", "asked.har"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads((folder / "asked.har").read_text(encoding="utf-8"))["log"]["entries"]
    return {
        ((entry["request"]["method"], urlsplit(entry["request"]["url"]).path), entry["response"]["status"])
        for entry in entries
    }


def with_real_rows(part: object) -> object:
    """The document with a row of the served model for its examples, so that there are answers and not only refusals."""
    if isinstance(part, list):
        return [with_real_rows(each) for each in part]
    if not isinstance(part, dict):
        return part
    part = {key: with_real_rows(value) for key, value in part.items()}
    row = [[0.5] * 28] * 28
    match part.get("examples"):
        case [{"inputs": [{"datatype": _}]}]:
            tensor = {"name": "x", "shape": [1, 28, 28], "datatype": "FP32", "data": [row]}
            part["examples"] = [{"inputs": [tensor]}]
        case [{"inputs": _}]:
            part["examples"] = [{"inputs": [row]}]
    return part
