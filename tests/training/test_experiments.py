from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from hbll.cli import main
from tests.training.test_trainer import Killed
from training import reproduce
from training.checkpoint import load_family, load_run_config
from training.config import ConfigError, MlpConfig, TrainConfig
from training.data_config import DigitsConfig
from training.experiments import published
from training.experiments.experiment import RESULT_FILE, Cell, Experiment, Result, Trial, run_all, run_trial
from training.experiments.families import FamilyTrial, Reading, run_config
from training.experiments.language import TextTrial
from training.experiments.recurrence import RnnTrial
from training.experiments.report import figures, markdown, write_report
from training.language import GptConfig
from training.loop import Recipe
from training.objective import hbll_evaluations
from training.text import embedded_text
from training.trainer import TrainingDiverged


class Known(Trial):
    """Measures what it is told to, and leaves a line in its folder whenever it does."""

    values: dict[str, float]
    row: str = "a"
    diverges: bool = False

    def measure(self, folder, on_share):
        with (folder / "runs.txt").open("a") as file:
            file.write("ran\n")
        if self.diverges:
            raise TrainingDiverged("the loss is nan")
        return [Cell(row=self.row, column=column, value=value) for column, value in self.values.items()]


def _experiment(*trials: Trial, **changes: object) -> Experiment:
    fields = {
        "name": "table0", "scale": "small", "title": "a table", "quantity": "accuracy, %", "data": "made up.",
        "stand_in": True, "trials": trials, "published": {("b", "BP"): 12.34, ("a", "HBLL"): 56.0}, "notes": ("A guess.",),
    }  # fmt: skip
    return Experiment(**(fields | changes))


def test_a_finished_trial_is_read_and_not_run_again(tmp_path: Path) -> None:
    trial = Known(name="one", values={"BP": 1.5})
    first = run_trial(trial, tmp_path)
    assert run_trial(trial, tmp_path) == first
    assert first.cells == (Cell(row="a", column="BP", value=1.5),)
    assert (tmp_path / "runs" / "one" / "runs.txt").read_text() == "ran\n"


def test_a_trial_of_other_settings_is_neither_reused_nor_overwritten(tmp_path: Path) -> None:
    run_trial(Known(name="one", values={"BP": 1.5}), tmp_path)
    before = (tmp_path / "runs" / "one" / RESULT_FILE).read_bytes()
    with pytest.raises(ConfigError, match="one was started with other settings"):
        run_trial(Known(name="one", values={"BP": 2.5}), tmp_path)
    assert (tmp_path / "runs" / "one" / RESULT_FILE).read_bytes() == before


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    trial = Known(name="one", values={"BP": 1.5})
    run_trial(trial, tmp_path)
    (tmp_path / "runs" / "one" / RESULT_FILE).write_text("{")
    with pytest.raises(ConfigError, match=r"result\.json cannot be used"):
        run_trial(trial, tmp_path)


def test_a_trial_that_diverges_is_left_out_and_the_others_run(tmp_path: Path) -> None:
    trials = [Known(name="one", values={}, diverges=True), Known(name="two", values={"BP": 2.0})]
    ends = {trial.name: end for trial, end in run_all(trials, tmp_path)}
    assert isinstance(ends["one"], TrainingDiverged)
    assert isinstance(ends["two"], Result)
    assert not (tmp_path / "runs" / "one" / RESULT_FILE).exists()


def test_trials_in_processes_of_their_own_end_as_they_do_in_this_one(tmp_path: Path) -> None:
    trials = [Known(name="one", values={}, diverges=True), Known(name="two", values={"BP": 2.0})]
    ends = {trial.name: end for trial, end in run_all(trials, tmp_path, jobs=2)}
    assert isinstance(ends["one"], TrainingDiverged)
    assert isinstance(ends["two"], Result)
    assert ends["two"].cells == run_trial(trials[1], tmp_path).cells


def test_an_interrupt_reports_what_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Known):
        def measure(self, folder, on_share):
            raise KeyboardInterrupt

    trials = Known(name="one", values={"BP": 1.5}), Interrupted(name="two", values={}), Known(name="three", values={})
    monkeypatch.setitem(reproduce.EXPERIMENTS, "table1", lambda *_: _experiment(*trials, name="table1"))
    result = CliRunner().invoke(main, ["reproduce", "table1", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "Aborted!" in result.output
    assert "1 of 3 runs" in (tmp_path / "table1-small" / "table1.md").read_text()
    assert not (tmp_path / "table1-small" / "runs" / "three").exists()


def test_the_table_has_means_with_errors_and_the_papers_figures_beside(tmp_path: Path) -> None:
    trials = [Known(name=f"seed{i}", values={"BP": 90.0 + i, "HBLL": 80.0}) for i in (0, 1)]
    trials.append(Known(name="ours", row="ours alone", values={"HBLL": 70.0}))
    results = [run_trial(trial, tmp_path) for trial in trials]
    text = markdown(_experiment(*trials), results, [], "hbll reproduce table0")
    lines = text.splitlines()
    assert lines[0] == "# table0, scale small: a table"
    assert lines[2:7] == [
        "|  | BP | BP, paper | HBLL | HBLL, paper |",
        "| --- | --: | --: | --: | --: |",
        "| ours alone |  |  | 70.0 |  |",
        "| b |  | 12.34 |  |  |",
        "| a | 90.5 ± 0.5 |  | 80.0 ± 0.0 | 56 |",
    ]
    assert "**Not the paper's data.** Data: made up." in text
    assert "3 of 3 runs: 0.0 core-minutes of CPU time" in text
    assert "- A guess." in text
    assert "    hbll reproduce table0" in lines
    assert figures(results)["a", "BP"].runs == 2


def test_time_is_counted_in_core_minutes(tmp_path: Path) -> None:
    """Waiting costs wall time alone."""

    class Slow(Known):
        def measure(self, folder, on_share):
            time.sleep(0.2)
            return super().measure(folder, on_share)

    trial = Slow(name="one", values={"BP": 1.5})
    result = run_trial(trial, tmp_path)
    assert result.core_seconds < 0.2 <= result.seconds
    shown = result.model_copy(update={"core_seconds": 90.0, "seconds": 600.0})
    text = " ".join(markdown(_experiment(trial), [shown], [], "hbll reproduce table0").split())
    assert "1 of 1 runs: 1.5 core-minutes of CPU time together (10.0 minutes of wall time" in text


def test_figures_in_another_unit_than_the_papers_say_so(tmp_path: Path) -> None:
    trial = Known(name="one", values={"BP": 1.5})
    experiment = _experiment(trial, published_quantity="perplexity", stand_in=False)
    text = markdown(experiment, [run_trial(trial, tmp_path)], ["two"], "hbll")
    assert "| BP, paper (perplexity) |" in text
    assert "Not the paper's data" not in text
    assert "Diverged and left out: two" in text


def test_the_csv_has_every_figure_of_every_trial_and_the_papers(tmp_path: Path) -> None:
    trials = [Known(name=f"seed{i}", values={"BP": 90.0 + i}) for i in (0, 1)]
    write_report(_experiment(*trials), [run_trial(trial, tmp_path) for trial in trials], [], "hbll", tmp_path)
    with (tmp_path / "table0.csv").open(newline="") as file:
        rows = [(row["scale"], row["trial"], row["row"], row["column"], row["value"]) for row in csv.DictReader(file)]
    assert rows == [
        ("small", "seed0", "a", "BP", "90"),
        ("small", "seed1", "a", "BP", "91"),
        ("paper", "paper", "b", "BP", "12.34"),
        ("paper", "paper", "a", "HBLL", "56.0"),
    ]
    assert (tmp_path / "table0.png").read_bytes().startswith(b"\x89PNG")


def _family_trial() -> FamilyTrial:
    config = run_config(MlpConfig(hierarchy_depth=2, width=8), DigitsConfig(shift=0), "hbll", epochs=1, batch=100)
    readings = tuple(Reading(row="a", column=c, paths=p, top=t) for c, p, t in [
        ("full", ("1-2-3",), 1), ("rung", ("2",), 1), ("worst", ("1-2-3", "2"), 1), ("all", ("2",), 10),
    ])  # fmt: skip
    return FamilyTrial(name="family", config=config, readings=readings)


def _rnn_trial() -> RnnTrial:
    return RnnTrial(
        name="rnn", task="psMNIST", cell="gru", hierarchy_depth=2, width=4, method="hbll", sweeps=1,
        recipe=Recipe(steps=6, batch=50, lr=0.01, clip=5.0),
    )  # fmt: skip


def _text_trial(vocabulary: int | None = None) -> TextTrial:
    return TextTrial(
        name="text", folder=None, vocabulary=vocabulary, perplexity=False,
        model=GptConfig(context=8, width=8, heads=2), column="c",
        settings=TrainConfig(method="hbll", nudge=0.0), recipe=Recipe(steps=6, batch=4, lr=0.01),
    )  # fmt: skip


@pytest.mark.parametrize("trial", [_family_trial(), _rnn_trial(), _text_trial()], ids=["family", "rnn", "text"])
def test_a_killed_trial_measures_what_an_uninterrupted_one_does(tmp_path: Path, trial: Trial) -> None:
    whole = run_trial(trial, tmp_path / "whole")

    def kill(share: float) -> None:
        if share > 0.7:
            raise Killed

    with pytest.raises(Killed):
        run_trial(trial, tmp_path / "killed", kill)
    shares: list[float] = []
    resumed = run_trial(trial, tmp_path / "killed", shares.append)
    assert shares[0] > 0.4, "started again from nothing"
    assert resumed.cells == whole.cells
    assert type(trial).model_validate_json(trial.model_dump_json()) == trial


def test_a_text_trial_keeps_the_settings_that_it_was_trained_with(tmp_path: Path) -> None:
    """Bug found: config.json had defaults for all that the recipe decides."""
    run_trial(_text_trial(), tmp_path)
    _, family, progress = load_family(tmp_path / "runs" / "text")
    settings = load_run_config(tmp_path / "runs" / "text").train
    assert (settings.batch, settings.lr, settings.warmup_steps, settings.clip, settings.evaluations) == (
        4,
        0.01,
        0,
        None,
        4,
    )
    assert (settings.method, settings.nudge) == ("hbll", 0)
    assert settings.budget * len(embedded_text().train.encode()) == pytest.approx(progress.evaluations)
    assert progress.evaluations == 6 * 4 * 8 * hbll_evaluations(family.tree)


def test_a_recurrent_trial_reports_the_chain_and_the_trees_last_and_first_rung(tmp_path: Path) -> None:
    trial = _rnn_trial()
    columns = [cell.column for cell in run_trial(trial, tmp_path).cells]
    assert columns == ["seq", "tree", "tree, first rung"]
    flat = trial.model_copy(update={"name": "flat", "hierarchy_depth": 1})
    seq, last, first = (cell.value for cell in run_trial(flat, tmp_path).cells)
    assert seq == last == first, "with one level the only rung is the chain"


def test_a_cell_of_several_paths_is_the_worst_of_them(tmp_path: Path) -> None:
    values = {cell.column: cell.value for cell in run_trial(_family_trial(), tmp_path).cells}
    assert values["worst"] == min(values["full"], values["rung"])
    assert values["all"] == 100, "the label is among all ten"


def test_the_paper_knows_what_its_tables_say() -> None:
    """Some figures of each table, as printed."""
    assert published.TABLE1["D=4, hidden 100", "BP"] == 11.32
    assert published.TABLE1["D=2, hidden 500", "HBLL"] == 98.32
    assert published.TABLE3["M80", "HBLL"] == 74.77
    assert published.TABLE6["psMNIST, GRU, D=8", "seq"] == 95.1
    assert published.TABLE7["0-1-...-8 (7 blocks)", "CFF+M"] == 85.37
    assert published.TABLE9["0-4-6-8 (2 blocks)", "HBLL"] == 24.08


def test_every_scale_of_every_experiment_has_trials_of_different_names(publish: Path, tmp_path: Path) -> None:
    for name, make in reproduce.EXPERIMENTS.items():
        for scale in ("smoke", "small", "paper"):
            experiment = make(scale, publish if scale == "paper" else None)
            assert experiment.stand_in == (scale != "paper" and name != "fig3")
            names = [trial.name for trial in experiment.trials]
            assert experiment.name == name
            assert len(names) == len(set(names)) > 1
            assert experiment.published


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("table1", "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz"),
        ("table3", "cifar-10-binary.tar.gz"),
        ("table6", "train-images-idx3-ubyte.gz"),
        ("table7", "cifar-10-binary.tar.gz"),
        ("table8", "cifar-100-binary.tar.gz"),
        ("table9", "wikitext-103-raw-v1.zip"),
    ],
)
def test_the_papers_scale_asks_for_the_papers_files(name: str, files: str, tmp_path: Path) -> None:
    asked = _run("reproduce", name, "--scale", "paper")
    assert f"{name} at scale paper reads" in asked
    assert files in asked
    assert "--download fetches what it lacks" in asked
    if name != "table9":  # which takes other text files, too
        assert files.split(", ")[0] in _run("reproduce", name, "--scale", "paper", "--data", str(tmp_path))
    assert not (tmp_path / "runs").exists()


def _run(*arguments: str) -> str:
    """What a command that fails says, on one line."""
    done = CliRunner().invoke(main, [*arguments])
    assert done.exit_code != 0, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    return " ".join(done.output.split())


def test_the_papers_files_are_fetched_only_when_that_is_said(
    publish: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "data", str(tmp_path / "out")
    folder.mkdir()
    ran = []
    nothing = _experiment(Known(name="one", values={"BP": 1.5}), name="table7")
    for name, make in (("table7", reproduce.table7), ("table9", reproduce.table9)):
        monkeypatch.setitem(reproduce.EXPERIMENTS, name, lambda *given, make=make: ran.append(make(*given)) or nothing)
    command = ["reproduce", "table7", "table9", "--scale", "paper", "--data", str(folder), "--out", out]
    assert "CIFAR-10 needs" in _run(*command)
    assert list(folder.iterdir()) == []
    done = CliRunner().invoke(main, [*command, "--download"])
    assert done.exit_code == 0, done.output
    assert {file.name for file in folder.iterdir()} == {"cifar-10-binary.tar.gz", "wikitext-103-raw-v1.zip"}
    seven, nine = ran
    assert "CIFAR-10, all of its test images" in seven.data
    assert nine.data.startswith("WikiText-103, in train, validation and test")
    assert "it goes with both" in _run("reproduce", "table7", "--download")
    assert "it goes with both" in _run("reproduce", "table7", "--scale", "paper", "--download")


def test_the_papers_trials_train_on_the_papers_data(publish: Path, tmp_path: Path) -> None:
    """Their configurations, made small: one family of each kind of image, and a recurrent network."""
    for name, labels in (("table1", 10), ("table3", 10), ("table8", 100)):
        trial = reproduce.EXPERIMENTS[name]("paper", publish).trials[-1]
        assert isinstance(trial, FamilyTrial)
        small: dict[str, object] = {"width": 12, "hidden": 12, "heads": 2} if name != "table1" else {"width": 8}
        config = trial.config.model_copy(
            update={
                "model": trial.config.model.model_copy(update=small | {"hierarchy_depth": 3}),
                "train": trial.config.train.model_copy(update={"budget": 6.0, "batch": 16}),
            }
        )
        paths = [reading.model_copy(update={"paths": ("4-6",)}) for reading in trial.readings]
        cells = run_trial(trial.model_copy(update={"config": config, "readings": tuple(paths)}), tmp_path / name).cells
        assert all(0 <= cell.value <= 100 for cell in cells)
        spec = (tmp_path / name / "runs" / trial.name / "data.json").read_text()
        assert len(json.loads(spec)["labels"]) == labels
        assert json.loads(spec)["description"].startswith(("MNIST", "CIFAR"))
    trial = reproduce.EXPERIMENTS["table6"]("paper", publish).trials[-1]
    assert isinstance(trial, RnnTrial)
    assert trial.recipe.steps == 200 * (180 // 128), "200 epochs of the 200 images, without those that are held out"
    recipe = trial.recipe.model_copy(update={"steps": 4, "batch": 16})
    result = run_trial(trial.model_copy(update={"width": 4, "hierarchy_depth": 3, "recipe": recipe}), tmp_path)
    assert all(cell.row.startswith("sMNIST") for cell in result.cells)


def test_settings_that_no_trial_has_are_refused() -> None:
    with pytest.raises(ValidationError):
        Known(name="one", values={}, speed=3)


def test_all_experiments_run_at_the_scale_of_a_test(tmp_path: Path) -> None:
    """Every table has figures of ours, and the same command again trains nothing."""
    command = ["reproduce", "all", "--scale", "smoke", "--out", str(tmp_path)]
    first = CliRunner().invoke(main, command)
    assert first.exit_code == 0, first.output
    for name in reproduce.EXPERIMENTS:
        folder = tmp_path / f"{name}-smoke"
        with (folder / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert {row["scale"] for row in rows} == {"smoke", "paper"}
        assert f"# {name}, scale smoke" in (folder / f"{name}.md").read_text()
        assert (folder / f"{name}.png").exists()
    written = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/runs/*/*") if file.is_file()}
    assert written
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 0, again.output
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/runs/*/*") if file.is_file()} == written
