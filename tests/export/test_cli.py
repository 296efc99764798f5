from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from hbll.cli import main


@pytest.mark.parametrize(
    ("bundle", "wrong"),
    [
        ("models/digits/1", []),
        ("models/digits/1/../2", []),
        ("models/digits/v1", ["'v1' is no version, a whole number from 1"]),
        ("models/my digits/2", ["'my digits' is no model's name, letters, digits"]),
        ("models/.digits/01", ["'.digits' is no model's name", "'01' is no version"]),
        ("bundle", ["'bundle' is no version"]),
    ],
)
def test_a_name_that_no_server_takes_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: str, wrong: list[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = CliRunner().invoke(main, ["export", ".", bundle])
    assert "holds no training run" in done.output  # so nothing was exported, and the warning came before that was found
    assert ("warning: no server will serve" in done.output) is bool(wrong)
    assert all(part in done.output for part in wrong)
