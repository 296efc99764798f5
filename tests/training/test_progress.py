"""What is seen of a run while it trains."""

from __future__ import annotations

import io
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console
from rich.progress import Progress

from hbll.cli import main
from training import progress
from training.checkpoint import CHECKPOINT_FILE
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


@contextmanager
def _interrupted_after(wanted: str, folder: Path) -> Iterator[None]:
    """Ctrl-C as soon as there is a file `wanted`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    ended = threading.Event()

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while not ended.wait(0.01) and time.monotonic() < deadline:
            if any(folder.glob(wanted)):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train"], r"stopped at step \d+ \(\d+%\): continue from the last checkpoint with the same command plus --resume"),
        (
            ["compare", "--methods", "hbll", "--seeds", "0"],
            r"stopped with 0 of 2 runs ended, in hbll-work-seed0 at step \d+ \(\d+%\): the same command goes on from the last",
        ),
    ],
)
def test_ctrl_c_says_how_to_go_on(tmp_path: Path, command: list[str], message: str) -> None:
    settings = ["model.kind=mlp", "train.budget=100000", "train.evaluations=1000"]
    changes = [part for text in settings for part in ("--set", text)]
    with _interrupted_after(f"**/{CHECKPOINT_FILE}", tmp_path):
        result = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "run"), *changes])
    assert result.exit_code == 130, result.output
    assert re.search(message, result.output)
    assert "Aborted" not in result.output


SETTINGS = ["--set", "model.kind=mlp", "--set", "model.width=8", "--set", "train.budget=2", "--set", "train.evaluations=1"]


def _interrupt(*_args: object, **_named: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_while_data_are_loaded_says_that_nothing_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was click's `Aborted!`."""
    monkeypatch.setattr("training.cli.load_data", _interrupt)
    result = CliRunner().invoke(main, ["train", "--out", str(tmp_path / "run")])
    assert result.exit_code == 130
    assert result.output == (
        f"stopped before the first step: {tmp_path / 'run'} is as it was, and the same command begins again\n"
    )
    assert not (tmp_path / "run").exists()


def test_ctrl_c_in_the_report_says_what_there_is_and_resuming_reports(tmp_path: Path) -> None:
    command = ["train", "--out", str(tmp_path), *SETTINGS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.assessment_report.assess", _interrupt)
        result = CliRunner().invoke(main, command)
    assert result.exit_code == 130
    assert f"stopped in the report: the run in {tmp_path} has ended" in result.output
    assert "Aborted" not in result.output
    log = (tmp_path / "log.csv").read_bytes()
    assert CliRunner().invoke(main, [*command, "--resume"]).exit_code == 0
    assert (tmp_path / "metrics.json").exists()
    assert (tmp_path / "log.csv").read_bytes() == log  # not trained again


def test_a_report_that_cannot_be_written_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "classes.csv").mkdir()
    result = CliRunner().invoke(main, ["train", "--out", str(tmp_path), *SETTINGS])
    assert result.exit_code == 1
    assert re.search(r"cannot write .*classes\.csv.*: Is a directory", result.output)
    assert "continue with --resume" in result.output


def test_ctrl_c_in_evaluate_says_that_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was click's `Aborted!`."""
    assert CliRunner().invoke(main, ["train", "--out", str(tmp_path), *SETTINGS]).exit_code == 0
    for place in ("training.assessment_report.assess", "training.cli.load_data_of"):
        monkeypatch.setattr(place, _interrupt)
        result = CliRunner().invoke(main, ["evaluate", str(tmp_path)])
        assert result.exit_code == 130
        assert (
            result.output == f"stopped: nothing of the run in {tmp_path} is lost, and the same command measures it again\n"
        )


def test_an_evaluation_that_cannot_be_written_is_told_in_a_sentence(tmp_path: Path) -> None:
    """It was a traceback."""
    assert CliRunner().invoke(main, ["train", "--out", str(tmp_path / "run"), *SETTINGS]).exit_code == 0
    (tmp_path / "file").touch()
    result = CliRunner().invoke(main, ["evaluate", str(tmp_path / "run"), "--out", str(tmp_path / "file" / "here")])
    assert result.exit_code == 1
    assert re.search(r"Error: cannot write .*here: Not a directory", result.output)


def test_a_comparison_that_cannot_be_written_keeps_its_runs_and_the_same_command_reports_on_them(tmp_path: Path) -> None:
    """It was a traceback."""
    (tmp_path / "comparison.md").mkdir()
    command = ["compare", "--methods", "exits", "--seeds", "0", "--out", str(tmp_path), *SETTINGS]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    told = " ".join(result.output.split())
    assert re.search(
        r"Error: cannot write .*comparison\.md.*: Is a directory\. The runs are kept: once that is fixed", told
    )
    (tmp_path / "comparison.md").rmdir()
    trained = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*/*")}
    assert CliRunner().invoke(main, command).exit_code == 0
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*/*")} == trained
    assert (tmp_path / "comparison.md").is_file()


def test_ctrl_c_before_and_after_the_runs_of_a_comparison_says_what_there_is(tmp_path: Path) -> None:
    """It was click's `Aborted!`."""
    command = ["compare", "--methods", "exits", "--seeds", "0", "--out", str(tmp_path / "out"), *SETTINGS]
    for place, message in (
        ("training.compare_cli.load_data", "stopped before the first run: "),
        ("training.compare_cli.run_all", "stopped with 0 of 2 runs ended: the same command"),
        ("training.workers.run", "stopped with 0 of 2 runs ended, in exits-work-seed0 at step 0 (0%): the same command"),
        ("training.compare_cli.write_report", "stopped in the report: all runs in "),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, _interrupt)
            result = CliRunner().invoke(main, command)
        assert result.exit_code == 130
        assert message in result.output
        assert "Aborted" not in result.output
    assert CliRunner().invoke(main, command).exit_code == 0
