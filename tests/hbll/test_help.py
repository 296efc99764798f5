"""What the commands say of themselves."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from hbll.cli import main
from training.methods import METHODS
from training.reproduce import EXPERIMENTS, RESEARCH


@pytest.mark.parametrize("command", ["train", "compare", "evaluate", "reproduce", "inspect", "verify", "export"])
def test_help_fits_80_columns(command: str) -> None:
    result = CliRunner().invoke(main, [command, "-h"], terminal_width=80)
    assert result.exit_code == 0
    assert [line for line in result.output.splitlines() if len(line) > 80] == []


def test_help_names_all_experiments_and_methods() -> None:
    told = CliRunner().invoke(main, ["reproduce", "-h"], terminal_width=80).output
    assert told.startswith("Usage: main reproduce [OPTIONS] EXPERIMENT...")
    assert all(name in told.partition("Scales:")[0].partition("Experiments:")[2] for name in EXPERIMENTS | RESEARCH)
    methods = " ".join(CliRunner().invoke(main, ["train", "-h"], terminal_width=80).output.partition("Methods:")[2].split())
    assert all(f"{name} {method.summary}" in methods for name, method in METHODS.items())
