from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from family.manifest import BundleError
from service.cli import serve
from service.settings import ModelSettings, Settings
from tests.fakes import fake_model


def test_single_models_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"a": {"min_depth": 2}, "b": {"policy": "static(4-6)", "audit_rate": 0.0, "default_latency_budget_ms": None}}
    monkeypatch.setenv("HBLL_PER_MODEL", json.dumps(own))
    monkeypatch.setenv("HBLL_POLICY", "slackfit")
    monkeypatch.setenv("HBLL_DEFAULT_LATENCY_BUDGET_MS", "7.5")
    settings = Settings()
    assert settings.of_model("a") == ModelSettings(policy="slackfit", min_depth=2, default_latency_budget_ms=7.5)
    assert settings.of_model("b") == ModelSettings(policy="static(4-6)", audit_rate=0)
    assert settings.of_model("c") == ModelSettings(policy="slackfit", default_latency_budget_ms=7.5)


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("HBLL_PER_MODEL", '{"digits": {"min_depth": 0}}', "per_model: digits.min_depth: Input should be greater than"),
        ("HBLL_PER_MODEL", '{"digits": {"mindepth": 1}}', "per_model: digits.mindepth: Extra inputs are not permitted"),
        ("HBLL_PER_MODEL", '{"digits": {"policy": "best"}}', "per_model: digits.policy: expected a policy of ladder-edf, "),
        ("HBLL_PER_MODEL", '{"digits": {"threads": 1}}', "per_model: digits.threads: Extra inputs are not permitted"),
        ("HBLL_PER_MODEL", '{"digits": 3}', "per_model.digits: Input should be a valid dictionary"),
        ("HBLL_PER_MODEL", "digits", 'wrong setting: error parsing value for field "per_model"'),
        ("HBLL_POLICY", "static", "policy: expected a policy of ladder-edf, "),
        ("HBLL_POLICY", "static(4-6", "policy: expected a policy of "),
        ("HBLL_MIN_DEPTH", "0", "min_depth: Input should be greater than or equal to 1"),
        ("HBLL_AUDIT_RATE", "2", "audit_rate: Input should be less than or equal to 1"),
        ("HBLL_POLL_S", "-1", "poll_s: Input should be greater than or equal to 0"),
        ("HBLL_DEFAULT_LATENCY_BUDGET_MS", "0", "default_latency_budget_ms: Input should be greater than 0"),
        ("HBLL_PERMODEL", "{}", "unknown variable HBLL_PERMODEL: expected some of HBLL_AUDIT_RATE, "),
    ],
)
def test_a_bad_value_stops_start_up_and_names_its_key(name: str, value: str, key: str) -> None:
    result = CliRunner().invoke(serve, ["/nowhere"], env={name: value})
    assert result.exit_code == 1
    assert key in result.output
    assert isinstance(result.exception, SystemExit)  # no traceback


def test_what_is_set_for_clients_is_no_setting_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HBLL_CLIENT_API_KEY", "sesame")
    assert "sesame" not in repr(Settings())


def test_bad_values_are_validation_errors_for_those_who_call() -> None:
    with pytest.raises(ValidationError, match=r"digits\.audit_rate"):
        Settings(per_model={"digits": {"audit_rate": -1}})


def test_help_names_every_setting() -> None:
    text = CliRunner().invoke(serve, ["--help"]).output
    for name in set(Settings.model_fields) - {"models", "threads", "device"}:  # those are arguments
        assert f"HBLL_{name.upper()}" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_depth": 8}, "model fake: expected min_depth to be at most 7, the deepest offered path, got 8"),
        ({"policy": "static(9-9)"}, r"model fake: policy static\(9-9\): the model offers the paths 4, "),
        ({"policy": "aimd(4)", "min_depth": 6}, r"model fake: policy aimd\(4\): the model offers the paths 1-2-3-4-5-6, "),
    ],
)
def test_a_model_that_lacks_what_is_set_for_it_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        fake_model(**settings)
