from __future__ import annotations

from pathlib import Path

import yaml

from service.openapi import contract
from tests.contract.conftest import Client

FILE = Path(__file__).parents[2] / "openapi.yaml"


def test_the_file_is_what_the_app_serves(client: Client) -> None:
    assert FILE.read_text(encoding="utf-8") == contract(), "run `make openapi` and look at the difference"
    assert yaml.safe_load(FILE.read_text(encoding="utf-8")) == client.get("/openapi.json").json()


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
