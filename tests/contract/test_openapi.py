from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from pydantic import BaseModel

from service import schemas
from service.description import EXAMPLES
from service.oip import schemas as oip_schemas
from service.openapi import contract, main
from tests.contract.conftest import Client

FILE = Path(__file__).parents[2] / "openapi.yaml"


def test_the_file_is_what_the_app_serves(client: Client) -> None:
    assert FILE.read_text(encoding="utf-8") == contract(), "run `make openapi` and look at the difference"
    assert yaml.safe_load(FILE.read_text(encoding="utf-8")) == client.get("/openapi.json").json()


def test_the_command_writes_the_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug found: `--help` wrote a file of that name."""
    monkeypatch.chdir(tmp_path)
    helped = CliRunner().invoke(main, ["--help"])
    assert (helped.exit_code, list(tmp_path.iterdir())) == (0, [])
    assert CliRunner().invoke(main, ["contract.yaml"]).exit_code == 0
    assert (tmp_path / "contract.yaml").read_text() == contract()


def test_every_error_has_the_one_shape() -> None:
    document = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for status, response in operation["responses"].items():
                if status == "200" or path == "/health/ready":
                    continue
                assert response == {"$ref": f"#/components/responses/{status}"}, f"{method} {path} {status}"
    for response in document["components"]["responses"].values():
        assert response["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}


@pytest.mark.parametrize(
    "kind", [schemas.PredictRequest, schemas.PredictResponse, oip_schemas.InferenceRequest, oip_schemas.InferenceResponse]
)
def test_examples_are_what_they_are_examples_of(kind: type[BaseModel]) -> None:
    examples = kind.model_json_schema()["examples"]
    assert examples
    for example in examples:
        assert set(kind.model_validate(example).model_dump(exclude_unset=True)) == set(example)


@pytest.mark.parametrize("name", json.loads(EXAMPLES.read_text()))
def test_examples_of_answers_are_such_answers(name: str) -> None:
    kinds = {kind.__name__: kind for module in (schemas, oip_schemas) for kind in vars(module).values() if _is_model(kind)}
    example = json.loads(EXAMPLES.read_text())[name]
    assert kinds[name].model_validate(example, strict=True).model_dump(mode="json", exclude_unset=True) == example


def test_every_json_answer_has_an_example() -> None:
    document = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    kinds = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            schema = operation["responses"]["200"].get("content", {}).get("application/json", {}).get("schema", {})
            schema = schema.get("items", schema)
            if "$ref" in schema:
                assert kinds[schema["$ref"].rpartition("/")[2]].get("examples"), f"{method} {path}"


def _is_model(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def test_every_code_of_an_error_is_told_by_status() -> None:
    responses = yaml.safe_load(FILE.read_text(encoding="utf-8"))["components"]["responses"]
    told = {status: set(each["content"]["application/json"]["examples"]) for status, each in responses.items()}
    assert told == {
        "400": {"bad_request", "malformed_input", "malformed_request"},
        "401": {"unauthorized"},
        "403": {"forbidden"},
        "404": {"not_found", "unknown_model", "unknown_version"},
        "405": {"method_not_allowed"},
        "408": {"request_timeout"},
        "413": {"body_too_large"},
        "415": {"unsupported_media_type"},
        "422": {"invalid_input", "not_offered"},
        "429": {"queue_full", "rate_limited"},
        "431": {"headers_too_large"},
        "500": {"inference_failed", "internal"},
        "503": {"not_ready", "too_many_connections"},
        "504": {"deadline_expired", "deadline_infeasible"},
    }
