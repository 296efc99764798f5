"""The client knows all that the contract has: no wish and no member of an answer is missing from it."""

from __future__ import annotations

from dataclasses import fields

import pytest
from pydantic import BaseModel

from hbll import client
from hbll.client import answers
from service import schemas


@pytest.mark.parametrize(
    ("kind", "schema", "of_its_own"),
    [
        (answers.Answer, schemas.PredictResponse, {"elapsed_ms", "requests", "request_id"}),
        (answers.Prediction, schemas.Prediction, set()),
        (answers.Risk, schemas.Risk, set()),
        (answers.Model, schemas.ModelSummary, set()),
        (answers.ModelDetail, schemas.ModelDetail, set()),
        (answers.Memory, schemas.ModelMemory, set()),
        (answers.Path, schemas.PathSummary, set()),
        (answers.Plan, schemas.Plan, set()),
        (answers.PlannedAnswer, schemas.PlannedAnswer, set()),
        (answers.Readiness, schemas.Readiness, set()),
    ],
)
def test_every_member_of_an_answer_is_one_of_the_client(kind: type, schema: type[BaseModel], of_its_own: set[str]) -> None:
    assert {field.name for field in fields(kind)} == schema.model_fields.keys() | of_its_own


def test_a_rung_is_all_that_an_event_says() -> None:
    told = {field.name for kind in (answers.Rung, answers.Prediction) for field in fields(kind)} - {"prediction"}
    assert told == schemas.StreamAnswer.model_fields.keys()


def test_every_wish_is_an_option() -> None:
    own = {"version", "timeout_s", "request_id"}
    assert client.Wishes.__annotations__.keys() == schemas.Wishes.model_fields.keys()
    assert client.PredictOptions.__annotations__.keys() - own == schemas.PredictRequest.model_fields.keys() - {"inputs"}
    assert client.StreamOptions.__annotations__.keys() - own == schemas.StreamRequest.model_fields.keys() - {"inputs"}
    assert client.Wishes.__annotations__.keys() | {"rows"} == schemas.PlanQuery.model_fields.keys()
