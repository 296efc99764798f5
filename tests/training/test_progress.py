"""What is seen of a run while it trains."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from training import progress
from training.config import MlpConfig, RunConfig, TrainConfig
from training.dataset import Dataset
from training.progress import progress_columns, train_with_bar


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    """Eighty columns."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(progress, "console", console)
    return console


def _lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", console.file.getvalue()).splitlines()


def test_bar_share_and_time_left_are_seen_at_80_columns(tmp_path: Path, digits: Dataset, terminal: Console) -> None:
    """Bug found: validation of all depths pushed them out."""
    run = RunConfig(model=MlpConfig(width=8), train=TrainConfig(budget=2, evaluations=1, batch=100))
    train_with_bar(run, tmp_path, digits)
    last = _lines(terminal)[-1].rstrip()
    assert re.fullmatch(r"training \S{12} 100% \d:\d\d:\d\d left 0:00:00 loss [\d.]+ val. 1:\d+\.\d 7:\d+\.\d %", last), (
        last
    )


def test_a_comparison_that_ended_has_no_time_left(terminal: Console) -> None:
    """Bug found: it said `left` and the time that it had taken."""
    name = "12/24 hbll+chains-lr0.0005-seed100"
    with Progress(*progress_columns("{task.description}"), console=terminal) as bar:
        bar.update(bar.add_task(name, total=1), completed=1)
    assert re.fullmatch(re.escape(name) + r" \S{12} 100% \d:\d\d:\d\d left 0:00:00", _lines(terminal)[-1].rstrip())
