from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from family.manifest import BundleError
from service.cli import serve
from service.flags import FLAGS
from service.settings import ModelSettings, Settings
from service.settings_page import settings_table, with_table
from service.sources import load_settings
from tests.fakes import fake_model

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


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
        (
            "HBLL_PER_MODEL",
            '{"digits": {"min_depth": 0}}',
            "per_model.digits.min_depth (environment HBLL_PER_MODEL): Input should be greater",
        ),
        (
            "HBLL_PER_MODEL",
            '{"digits": {"mindepth": 1}}',
            "per_model.digits.mindepth (environment HBLL_PER_MODEL): Extra inputs are not permitted",
        ),
        (
            "HBLL_PER_MODEL",
            '{"digits": {"policy": "best"}}',
            "per_model.digits.policy (environment HBLL_PER_MODEL): expected a policy of ",
        ),
        (
            "HBLL_PER_MODEL",
            '{"digits": {"threads": 1}}',
            "per_model.digits.threads (environment HBLL_PER_MODEL): Extra inputs are not permitted",
        ),
        (
            "HBLL_PER_MODEL",
            '{"digits": 3}',
            "per_model.digits (environment HBLL_PER_MODEL): Input should be a valid dictionary",
        ),
        ("HBLL_PER_MODEL", "digits", 'wrong setting: error parsing value for field "per_model"'),
        ("HBLL_POLICY", "static", "policy (environment HBLL_POLICY): expected a policy of ladder-edf, "),
        ("HBLL_POLICY", "static(4-6", "policy (environment HBLL_POLICY): expected a policy of "),
        ("HBLL_MIN_DEPTH", "0", "min_depth (environment HBLL_MIN_DEPTH): Input should be greater than or equal to 1"),
        ("HBLL_AUDIT_RATE", "2", "audit_rate (environment HBLL_AUDIT_RATE): Input should be less than or equal to 1"),
        ("HBLL_POLL_S", "-1", "poll_s (environment HBLL_POLL_S): Input should be greater than or equal to 0"),
        (
            "HBLL_DEFAULT_LATENCY_BUDGET_MS",
            "0",
            "default_latency_budget_ms (environment HBLL_DEFAULT_LATENCY_BUDGET_MS): Input should be greater than 0",
        ),
        ("HBLL_PERMODEL", "{}", "unknown variable HBLL_PERMODEL: expected some of HBLL_ACCESS_LOG, "),
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
    for name in set(Settings.model_fields) - {"models"}:  # that is the argument
        assert (f"--{name.replace('_', '-')}" if name in FLAGS else f"HBLL_{name.upper()}") in text


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "hbll.toml"
    file.write_text(
        """
        port = 7001
        max_batch = 16
        policy = "slackfit"
        log_format = "json"

        [per_model.digits]
        min_depth = 2
        default_latency_budget_ms = "none"
        """
    )
    return file


def test_flags_win_over_the_environment_and_that_over_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HBLL_CONFIG", str(file))
    monkeypatch.setenv("HBLL_PORT", "7002")
    monkeypatch.setenv("HBLL_MAX_BATCH", "17")
    monkeypatch.setenv("HBLL_PER_MODEL", '{"digits": {"audit_rate": 0.5}}')
    sourced = load_settings({"port": "7003"})
    settings, origin = sourced.settings, sourced.sources.origin
    assert (settings.port, origin(["port"])) == (7003, "flag --port")
    assert (settings.max_batch, origin(["max_batch"])) == (17, "environment HBLL_MAX_BATCH")
    assert (settings.policy, origin(["policy"])) == ("slackfit", f"file {file}")
    assert (settings.host, origin(["host"])) == ("127.0.0.1", "default")
    own = settings.of_model("digits")
    assert (own.min_depth, own.audit_rate, own.policy) == (2, 0.5, "slackfit")
    assert origin(["per_model", "digits", "min_depth"]) == f"file {file}"
    assert origin(["per_model", "digits", "audit_rate"]) == "environment HBLL_PER_MODEL"


def test_what_show_config_prints_is_a_file_with_the_same_settings(file: Path, tmp_path: Path) -> None:
    environment = {"HBLL_DEFAULT_LATENCY_BUDGET_MS": "7.5", "HBLL_AUDIT_RATE": "0.25"}
    arguments = ["somewhere", "--config", str(file), "--access-log", "--port", "7004", "--show-config"]
    shown = CliRunner().invoke(serve, arguments, env=environment)
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    for line in (
        'models = "somewhere" # argument MODELS',
        "port = 7004 # flag --port",
        "access_log = true # flag --access-log",
        "audit_rate = 0.25 # environment HBLL_AUDIT_RATE",
        f"max_batch = 16 # file {file}",
        'host = "127.0.0.1" # default',
        "# keys_file =  # default",
        f'default_latency_budget_ms = "none" # file {file}',
    ):
        assert line in lines
    again = tmp_path / "again.toml"
    again.write_text(shown.output)
    first = load_settings({"models": "somewhere", "config": file, "access_log": True, "port": 7004, "audit_rate": 0.25})
    assert load_settings({"config": again}).settings == first.settings.model_copy(
        update={"config": again, "default_latency_budget_ms": 7.5}
    )


def test_show_config_masks_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = tmp_path / "cert.pem"
    certificate.touch()
    monkeypatch.setenv("HBLL_TLS_KEY_PASSWORD", "open sesame")
    shown = CliRunner().invoke(serve, ["--tls-cert", str(certificate), "--show-config"]).output
    assert '# tls_key_password = "**********"  # environment HBLL_TLS_KEY_PASSWORD, masked' in shown.splitlines()
    assert "sesame" not in shown
    assert load_settings({"tls_cert": certificate}).settings.key_password == "open sesame"


def test_the_password_of_the_key_can_be_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").touch()
    (tmp_path / "password").write_text("open sesame\n")
    settings = Settings(tls_cert=tmp_path / "cert.pem", tls_key_password_file=tmp_path / "password")
    assert settings.key_password == "open sesame"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot = 1", "wrong setting: prot (file FILE): Extra inputs are not permitted"),
        ('port = "many"', "wrong setting: port (file FILE): Input should be a valid integer"),
        ("[per_model.digits]\nmin_depth = 0", "per_model.digits.min_depth (file FILE): Input should be greater than"),
        ("[per_model.digits]\nport = 1", "per_model.digits.port (file FILE): Extra inputs are not permitted"),
        ('config = "other.toml"', "FILE: config: a file of settings cannot name another"),
        ("port = ", "FILE cannot be read as TOML: Invalid value (at end of document)"),
        (
            "port = 1\nprot = 1\nworkers = 2",
            "workers (file FILE): expected 1, got 2: the models of a device have one scheduler",
        ),
    ],
)
def test_a_bad_file_stops_start_up_and_names_the_key_and_itself(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "hbll.toml"
    file.write_text(content)
    result = CliRunner().invoke(serve, ["/nowhere", "--config", str(file)])
    assert result.exit_code == 1
    assert message.replace("FILE", str(file)) in result.output
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "99999"], "wrong setting: port (flag --port): Input should be less than or equal to 65535"),
        (["--config", "/nowhere.toml"], "wrong setting: /nowhere.toml: there is no such file"),
        (["--workers", "2"], "workers (flag --workers): expected 1, got 2: the models of a device have one scheduler"),
        (["--tls-key", __file__], "wrong setting: tls_cert must be given with tls_key"),
        (["--tls-cert", "/nowhere.pem"], "tls_cert (flag --tls-cert): Path does not point to a file"),
        (["--keys-file", "/nowhere.toml"], "the keys file /nowhere.toml does not exist: `hbll keys add NAME"),
    ],
)
def test_a_bad_flag_stops_start_up_and_is_named(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(serve, ["/nowhere", *arguments])
    assert result.exit_code == 1
    assert message in result.output
    assert isinstance(result.exception, SystemExit)


def test_several_processes_are_refused_with_the_reason() -> None:
    result = CliRunner().invoke(serve, ["/nowhere"], env={"WEB_CONCURRENCY": "4"})
    assert result.exit_code == 1
    assert "WEB_CONCURRENCY: expected 1, got '4': see the setting workers" in result.output


def test_the_page_of_settings_is_what_they_say_of_themselves() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert settings_table() in page, "run `make settings`"
    assert with_table(page) == page
    assert with_table(page.replace("| `port` |", "| `prot` |")) == page


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
