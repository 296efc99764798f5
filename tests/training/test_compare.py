from __future__ import annotations

import copy
import csv
import statistics
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from hbll.cli import main
from tests.training.test_custom import small
from tests.training.test_trainer import Killed
from training.assessment import METRICS_FILE
from training.checkpoint import CHECKPOINT_FILE
from training.compare import Job, choose_rates, plan, plan_tuning, run
from training.config import ConfigError, CustomConfig, MethodName, MlpConfig, RunConfig, TrainConfig
from training.dataset import Dataset
from training.methods import METHODS
from training.report import Matched, Record, differences, markdown, summarise
from training.trainer import LOG_FILE, Report

TINY = RunConfig(
    model=MlpConfig(hierarchy_depth=2, width=8), train=TrainConfig(budget=6, batch=100, evaluations=2, warmup_steps=0)
)


def _compare(out: Path, *arguments: str) -> Result:
    tiny = ["model.kind=mlp", "model.hierarchy_depth=2", "model.width=8", "train.batch=100", "train.evaluations=1"]
    settings = [part for text in tiny for part in ("--set", text)]
    return CliRunner().invoke(main, ["compare", "--out", str(out), "--budget", "6", *settings, *arguments])


def test_budgets_are_matched_by_work_by_epochs_and_by_steps() -> None:
    """With the default budget of 390: networks of 1, 2, 3 and 7 blocks over 30 epochs, 390 = 30 * 13."""
    jobs = plan(RunConfig(), ["hbll", "exits", "bp"], [4], images=3200)
    budgets = {job.name: job.config.train.budget for job in jobs}
    assert len(budgets) == len(jobs) == 4 + 4 + 4
    assert budgets["hbll-work-seed4"] == budgets["exits-work-seed4"] == 390
    assert budgets["hbll-epochs-seed4"] == pytest.approx(30 * 11)
    assert budgets["exits-epochs-seed4"] == pytest.approx(30 * 3)
    assert [budgets[f"bp{blocks}-work-seed4"] for blocks in (1, 2, 3, 7)] == pytest.approx([30, 60, 90, 210])
    steps = 3546  # of hbll: 390 * 3200 / (11 * 32) = 3545.5; an epoch is 100
    assert budgets["bp3-steps-seed4"] == pytest.approx(3 * steps / 100)
    assert all(job.config.train.seed == 4 for job in jobs)
    assert all((job.config.train.blocks is not None) == (job.config.train.method == "bp") for job in jobs)


def test_two_methods_make_a_table_and_the_same_command_again_trains_nothing(tmp_path: Path) -> None:
    first = _compare(tmp_path, "--methods", "exits,chains", "--seeds", "0,1")
    assert first.exit_code == 0, first.output
    with (tmp_path / "comparison.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    assert {row["method"] for row in records} == {"exits", "chains"}
    assert {row["path"] for row in records if row["method"] == "exits"} == {"2", "2-3"}
    one_block = [
        100 * float(row["test_accuracy"])
        for row in records
        if (row["method"], row["matched"], row["path"]) == ("exits", "work", "2")
    ]
    assert len(one_block) == 2
    table = (tmp_path / "comparison.md").read_text()
    line = next(line for line in table.splitlines() if line.startswith("| `exits` | work |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:6] == ["2", "0.008", "3.0", "6"]  # seeds, rate, epochs of 2 evaluations an image, evaluations
    expected = statistics.mean(one_block), statistics.stdev(one_block) / 2**0.5
    assert [float(part) for part in cells[6].split(" ± ")] == pytest.approx(expected, abs=0.051)  # a digit after the point
    assert cells[8] == ""  # the ladder has no path of all blocks
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")

    written = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*/*") if file.is_file()}
    again = _compare(tmp_path, "--methods", "exits,chains", "--seeds", "0,1,2")
    assert again.exit_code == 0, again.output
    assert {file: file.stat().st_mtime_ns for file in written} == written
    assert len(list(tmp_path.glob("runs/*-seed2"))) == 4
    assert "| `exits` | work | 3 |" in (tmp_path / "comparison.md").read_text()


def test_a_run_that_was_killed_goes_on(tmp_path: Path, digits: Dataset) -> None:
    job = Job("work", TINY)

    def kill_late(report: Report) -> None:
        if report.share > 0.6:
            raise Killed

    with pytest.raises(Killed):
        run(job, tmp_path, digits, kill_late)
    steps: list[int] = []
    records = run(job, tmp_path, digits, lambda report: steps.append(report.step))
    assert steps[0] > 1, "started again from nothing"
    assert len(records) == 4
    assert run(job, tmp_path, digits, lambda _: pytest.fail("trained again")) == records


def test_a_run_that_another_process_is_at_is_waited_for(tmp_path: Path, digits: Dataset) -> None:
    """Bug found: processes that share a folder, as the documentation has them do, both trained the tuning runs."""
    job, steps = Job("work", TINY), list[int]()
    with ThreadPoolExecutor(1) as pool:
        others: list[Future[list[Record]]] = []

        def start_another(_: Report) -> None:
            if not others:
                others.append(pool.submit(run, job, tmp_path, digits, lambda report: steps.append(report.step)))

        records = run(job, tmp_path, digits, start_another)
        assert others[0].result() == records
    assert steps == []


def test_a_run_of_another_configuration_is_neither_reused_nor_overwritten(tmp_path: Path, digits: Dataset) -> None:
    run(Job("work", TINY), tmp_path, digits, lambda _: None)
    checkpoint = tmp_path / "runs" / Job("work", TINY).name / CHECKPOINT_FILE
    before = checkpoint.read_bytes()
    other = TINY.model_copy(update={"train": TINY.train.model_copy(update={"lr": 0.1})})
    with pytest.raises(ConfigError, match=r"hbll\+chains-work-seed0 was started with another configuration"):
        run(Job("work", other), tmp_path, digits, lambda _: None)
    assert checkpoint.read_bytes() == before


def _record(method: MethodName, matched: Matched, seed: int, depth: int, accuracy: float, lr: float = 4e-3) -> Record:
    return Record(method, matched, seed, lr, 2.0, 2.0 * depth, "-".join("123"[:depth]), depth, True, accuracy, accuracy)


def test_no_run_trains_the_modules_that_a_factory_keeps(tmp_path: Path, blobs: Dataset) -> None:
    """Such as a pretrained embedding: the next run of the same process would begin where this one ended."""
    kept = small()
    before = copy.deepcopy(kept.state_dict())
    settings = TINY.train.model_copy(update={"batch": 16})
    config = RunConfig(model=CustomConfig(hierarchy_depth=2), data=blobs.source, train=settings)
    run(Job("work", config), tmp_path, blobs, lambda _: None, lambda _: kept)
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.state_dict().items())


def test_separate_networks_are_one_row_and_diverged_seeds_are_counted() -> None:
    found = ((0, 1, 0.5, 4e-3), (0, 2, 0.6, 2e-3), (0, 3, 0.7, 4e-3), (1, 1, 0.7, 4e-3), (1, 2, 0.6, 2e-3))
    records = [_record("bp", "work", *values) for values in found]
    (row,) = summarise(records)
    assert row.evaluations == 2 * (1 + 2 + 3)
    assert (row.by_depth[1].mean, row.by_depth[1].error) == pytest.approx((0.6, 0.1))
    assert (row.by_depth[3].mean, row.by_depth[3].error) == (0.7, None)
    line = (
        "| `bp`, separate networks | work | 2 of 3 | 0.004 / 0.002 / 0.004 | 2.0 | 12 "
        "| 60.0 ± 10.0 | 60.0 ± 0.0 | 70.0 |  |  |"
    )
    assert line in markdown(TINY, (1, 2, 3), (0, 1, 2), records)


def test_differences_are_paired_by_seed_and_over_the_depths_that_both_have() -> None:
    records = [_record("exits", "work", seed, depth, 0.8 + 0.1 * seed) for seed in (0, 1, 2) for depth in (1, 2)]
    records += [
        _record("bp", "work", seed, depth, 0.7 + 0.1 * seed - 0.02 * depth) for seed in (0, 1) for depth in (1, 2, 3)
    ]
    records += [_record("exits", "epochs", 0, 1, 0.1), _record("exits", "tuning", 0, 1, 0.1)]
    (only,) = differences(records)
    assert (only.method, only.matched) == ("exits", "work")
    assert [only.by_depth[depth].mean for depth in (1, 2)] == pytest.approx([0.12, 0.14])
    assert [only.by_depth[depth].error for depth in (1, 2)] == pytest.approx([0, 0], abs=1e-12)  # what seeds share cancels
    assert only.average.mean == pytest.approx(0.13)
    assert "| `exits` | work | +12.0 ± 0.0 | +14.0 ± 0.0 |  | +13.0 ± 0.0 |" in markdown(
        TINY, (1, 2, 3), (0, 1, 2), records
    )


def test_each_method_and_each_separate_network_gets_the_rate_that_is_best_on_validation_data() -> None:
    jobs = plan_tuning(TINY, ["exits", "bp"], [100, 101], [1e-3, 1e-2])
    assert len({job.name for job in jobs}) == len(jobs) == (1 + 3) * 2 * 2
    assert all(job.config.train.budget == 6 for job in jobs if job.config.train.method == "exits")

    def results(job: Job) -> list[Record]:
        settings = job.config.train
        high = (settings.lr == 1e-2) == (settings.method == "exits" or settings.blocks == 2)
        return [_record(settings.method, "tuning", settings.seed, settings.blocks or 1, 0.6 if high else 0.5, settings.lr)]

    rates = choose_rates(TINY, [(job, results(job)) for job in jobs])
    assert rates == {("exits", None): 1e-2, ("bp", 1): 1e-3, ("bp", 2): 1e-2, ("bp", 3): 1e-3}
    of_runs = {job.trained: job.config.train.lr for job in plan(TINY, ["exits", "bp"], [0], 3000, rates)}
    assert of_runs == rates


def test_rates_are_tuned_before_they_are_compared_and_the_report_tells_both(tmp_path: Path) -> None:
    result = _compare(tmp_path, "--methods", "chains,bp", "--seeds", "0", "--rates", "1e-6,1e-2")
    assert result.exit_code == 0, result.output
    assert sorted(folder.name for folder in tmp_path.glob("runs/chains-*")) == [
        "chains-epochs-seed0", "chains-lr0.01-seed100", "chains-lr1e-06-seed100", "chains-work-seed0",
    ]  # fmt: skip
    text = (tmp_path / "comparison.md").read_text()
    assert "| `chains` | work | 1 | 0.01 |" in text  # 1e-6 learns nothing in six passes
    assert "| method | 1e-06 | 0.01 |" in text
    assert "| `chains` | steps |" in text.split("## Families less separate networks")[1]


def test_a_method_whose_paths_have_no_column_is_tuned_by_those_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug found: after all tuning runs, `mean requires at least one data point`."""
    monkeypatch.setitem(METHODS, "my:deep", METHODS["exits"])
    records = [_record("my:deep", "tuning", 100, 4, accuracy, lr) for lr, accuracy in ((1e-3, 0.5), (1e-2, 0.6))]
    jobs = plan_tuning(TINY, ["my:deep"], [100], [1e-3, 1e-2])
    results = [(job, [record]) for job, record in zip(jobs, records, strict=True)]
    assert choose_rates(TINY, results) == {("my:deep", None): 1e-2}
    assert "| `my:deep` | 50.0 | 60.0 |" in markdown(TINY, (1, 2, 3), [0], records)


def test_ranges_of_seeds_are_all_their_numbers(tmp_path: Path) -> None:
    listed = _compare(
        tmp_path, "--methods", "exits", "--seeds", "3, 5-7,6", "--tuning-seeds", "100-101", "--rates", "1e-3", "--dry-run"
    )
    rows = [line.split() for line in listed.output.splitlines() if line.startswith("exits")]
    assert [int(row[2]) for row in rows] == [100, 101, 3, 3, 5, 5, 6, 6, 7, 7]


def test_a_dry_run_lists_every_run_with_its_budget_and_writes_nothing(tmp_path: Path) -> None:
    listed = _compare(tmp_path / "out", "--methods", "exits,bp", "--seeds", "0", "--rates", "1e-3,1e-2", "--dry-run")
    assert listed.exit_code == 0, listed.output
    header, *rows, total, _ = [line.split(maxsplit=6) for line in listed.output.splitlines()]
    assert header == ["method", "matched", "seed", "rate", "evaluations", "epochs", "state"]
    assert ["exits", "tuning", "100", "0.001", "6.0", "3.0", "to train"] in rows
    assert ["bp2", "steps", "0", "tuned", "6.0", "3.0", "after tuning"] in rows
    assert len(rows) == 2 * (1 + 3) + 2 + 3 + 3
    assert " ".join(total).startswith("16 runs, 0 ended, 16 left: 0.")
    assert max(map(len, listed.output.splitlines())) <= 80
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_which_runs_are_there_and_how_far_others_are(tmp_path: Path, digits: Dataset) -> None:
    arguments = ["--methods", "exits", "--seeds", "0", "--rates", "1e-3,1e-2"]
    assert _compare(tmp_path, *arguments).exit_code == 0
    (tmp_path / "runs" / "exits-epochs-seed0" / METRICS_FILE).unlink()
    log = tmp_path / "runs" / "exits-epochs-seed0" / LOG_FILE
    log.write_text(log.read_text().replace("1.0000", "0.5000", 1))
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    listed = _compare(tmp_path, *arguments, "--dry-run").output
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == written
    states = [line.split(maxsplit=6) for line in listed.splitlines() if line.startswith("exits")]
    assert [row[6] for row in states] == ["finished"] * 3 + ["50% done"]
    assert states[2][3] == "0.01", "the rate that tuning chose"
    left = 0.5 * 2 * len(digits.train) / 1e6
    assert f"4 runs, 3 ended, 1 left: {left:.1f} million block evaluations" in listed


def test_a_run_that_diverged_has_ended(tmp_path: Path) -> None:
    """Bug found: each call trained it again to the step at which it diverges, and a dry run always had it left."""
    arguments = ["--methods", "exits", "--seeds", "0", "--rates", "1e-3,1e38", "--set", "train.warmup_steps=0"]
    command = [*arguments, "--set", "model.kind=resmlp"]
    first = _compare(tmp_path, *command)
    assert first.exit_code == 0, first.output
    listed = _compare(tmp_path, *command, "--dry-run").output
    rows = [line.split(maxsplit=6) for line in listed.splitlines() if line.startswith("exits")]
    assert [(row[3], row[6]) for row in rows] == [
        ("0.001", "finished"), ("1e+38", "diverged"), ("0.001", "finished"), ("0.001", "finished"),
    ]  # fmt: skip
    assert "4 runs, 4 ended, 0 left: 0.0 million block evaluations" in listed
    written = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*/*")}
    report = (tmp_path / "comparison.md").read_bytes()
    diverged = tmp_path / "runs" / "exits-lr1e+38-seed100"
    for jobs in ("1", "2"):
        again = _compare(tmp_path, *command, "--jobs", jobs)
        assert again.exit_code == 0, again.output
        told = "".join(again.output.split())
        assert "exits-lr1e+38-seed100:leftout:thelossis" in told
        assert f"totrainitagain,remove{diverged}" in told
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*/*")} == written
    assert (tmp_path / "comparison.md").read_bytes() == report
    other = _compare(tmp_path, *command, "--set", "train.clip=1", "--dry-run")
    assert "exits-lr0.001-seed100 was started with another configuration" in " ".join(other.output.split())


def test_a_folder_that_is_taken_is_told_before_anything_trains(tmp_path: Path) -> None:
    """Bug found: other --methods in the same --out trained for their time, and failed at the networks matched by steps."""
    assert _compare(tmp_path, "--methods", "exits,bp", "--seeds", "0").exit_code == 0
    runs = sorted(tmp_path.glob("runs/*"))
    clash = _compare(tmp_path, "--methods", "hbll,bp", "--seeds", "0")
    assert clash.exit_code == 1
    told = " ".join(clash.output.split())
    assert "bp1-steps-seed0 was started with another configuration, train.budget" in told
    assert "as the first family of --methods, which is now hbll: name the family first that was first before" in told
    assert sorted(tmp_path.glob("runs/*")) == runs
    other = _compare(tmp_path, "--methods", "exits", "--seeds", "0", "--rates", "1e-3", "--set", "train.clip=1")
    assert "exits-work-seed0 was started with another configuration, train.clip null (now 1.0): give" in other.output
    assert sorted(tmp_path.glob("runs/*")) == runs


def test_a_comparison_in_which_all_diverge_says_so(tmp_path: Path) -> None:
    diverged = _compare(
        tmp_path, "--methods", "exits", "--seeds", "0", "--set", "train.lr=1e38", "--set", "train.warmup_steps=0",
        "--set", "model.kind=resmlp",
    )  # fmt: skip
    assert diverged.exit_code == 1
    assert "every run diverged: there is nothing to report" in diverged.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "chains,magic"], "there is no method magic; there are hbll+chains, hbll,"),
        (["--seeds", "one"], "or ranges of them, with commas between them, like 0,1,2 or 0-9,20; got 'one'"),
        (["--seeds", "0,-1"], "expected whole numbers from 0 on, or ranges of them, with commas between them"),
        (["--seeds", "4294967296"], "train.seed"),
        (["--tuning-seeds", "104-100"], "like 0,1,2 or 0-9,20; got '104-100'"),
        (["--rates", "1e-3,fast"], "expected learning rates with commas between them, got '1e-3,fast'"),
        (["--rates", "0"], "train.lr"),
        (["--set", "train.patience=2"], "train.patience lets each run stop when it likes"),
    ],
)
def test_what_cannot_be_compared_is_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = _compare(tmp_path, *arguments)
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_what_would_be_done_and_writes_nothing(tmp_path: Path) -> None:
    arguments = ["train", "--method", "exits", "--set", "model.width=24", "--out", str(tmp_path / "run"), "--dry-run"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "width = 24" in result.output
    assert "# paths trained: 3 of 25" in result.output
    assert "# work: 1,170,000 block evaluations, 3 a row on average; about 6,094 steps, 130.0 epochs" in result.output
    assert list(tmp_path.iterdir()) == []
