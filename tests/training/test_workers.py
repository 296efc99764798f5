"""Runs of a comparison at the same time, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from hbll.cli import main
from training.assessment import METRICS_FILE
from training.checkpoint import CHECKPOINT_FILE
from training.compare import Job
from training.config import MlpConfig, RunConfig, TrainConfig
from training.dataset import Dataset
from training.workers import At, Failure, Message, run_all

TINY = [
    "--set", "model.kind=mlp", "--set", "model.hierarchy_depth=2", "--set", "model.width=8", "--set", "train.batch=100",
    "--methods", "exits", "--seeds", "0", "--set", "train.evaluations=1",
]  # fmt: skip


def _job(seed: int, kind: type[Job] = Job) -> Job:
    settings = TrainConfig(method="exits", budget=2, batch=100, evaluations=1, warmup_steps=0, seed=seed)
    return kind("work", RunConfig(model=MlpConfig(hierarchy_depth=2, width=8), train=settings))


class Deadly(Job):
    """Kills the process that would run it."""

    @property
    def name(self) -> str:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return "deadly"


def _run(jobs: list[Job], out: Path, data: Dataset, at_once: int) -> dict[str, list[Message]]:
    told: dict[str, list[Message]] = {}
    run_all(jobs, out, data, lambda job, message: told.setdefault(job.name, []).append(message), at_once=at_once)
    return told


def test_runs_at_the_same_time_write_what_they_write_one_after_another(tmp_path: Path) -> None:
    outputs = []
    for jobs in ("1", "2"):
        out = tmp_path / jobs
        result = CliRunner().invoke(main, ["compare", "--out", str(out), "--budget", "4", "--jobs", jobs, *TINY])
        assert result.exit_code == 0, result.output
        outputs.append(result.output)
    one, two = ({file.relative_to(tmp_path / jobs) for file in (tmp_path / jobs).rglob("*")} for jobs in "12")
    named = {file for file in one if "tensorboard" not in file.parts}  # whose names have a time and a process
    assert named == {file for file in two if "tensorboard" not in file.parts}
    for name in named:
        first, second = tmp_path / "1" / name, tmp_path / "2" / name
        if name.suffix == ".safetensors":  # whose header has no order
            weights = load_file(second)
            assert all(torch.equal(tensor, weights[key]) for key, tensor in load_file(first).items())
        elif first.is_file():
            assert first.read_bytes() == second.read_bytes(), name
    assert "2/2" in outputs[1]


_FACTORY = """
from torch import nn
from training.model import Family, Standardise
def build(spec):
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]
    return Family(nn.Sequential(Standardise(spec), nn.Linear(4, 6)), blocks, nn.Linear(6, len(spec.labels)))
"""


def test_a_model_of_ones_own_is_compared_as_it_is_trained(
    tmp_path: Path, blobs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of processes, each run begins with the weights of `hbll train` with its seed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "compared_model_of_a_test.py").write_text(_FACTORY)
    (tmp_path / "own.toml").write_text(
        '[model]\nkind = "custom"\nhierarchy_depth = 2\nfactory = "compared_model_of_a_test:build"\n'
        '[data]\nkind = "arrays"\nfile = "blobs.npz"\n[train]\nbudget = 6\nbatch = 16\nevaluations = 1\n'
    )
    compare = ["compare", "--config", "own.toml", "--methods", "exits,bp", "--seeds", "1"]
    for arguments in (["--dry-run"], ["--jobs", "2"]):
        refused = CliRunner().invoke(main, [*compare, "--out", "1", *arguments])
        assert refused.exit_code == 1
        assert "name it: --factory compared_model_of_a_test:build" in refused.output
    assert "compared_model_of_a_test" not in sys.modules
    assert not (tmp_path / "1").exists()
    named = ["--factory", "compared_model_of_a_test:build"]
    for jobs in ("1", "2"):
        done = CliRunner().invoke(main, [*compare, "--out", jobs, "--jobs", jobs, *named])
        assert done.exit_code == 0, done.output
    assert (tmp_path / "1" / "comparison.csv").read_bytes() == (tmp_path / "2" / "comparison.csv").read_bytes()
    train = ["train", "--config", "own.toml", "--method", "exits", "--seed", "1", "--out", "run"]
    trained = CliRunner().invoke(main, [*train, *named])
    assert trained.exit_code == 0, trained.output
    weights = load_file(tmp_path / "run" / CHECKPOINT_FILE)
    for jobs in ("1", "2"):
        compared = load_file(tmp_path / jobs / "runs" / "exits-work-seed1" / CHECKPOINT_FILE)
        assert all(torch.equal(tensor, compared[name]) for name, tensor in weights.items())


def test_a_process_that_dies_in_a_run_takes_no_other_run_with_it(tmp_path: Path, digits: Dataset) -> None:
    told = _run([_job(0, Deadly), _job(1), _job(2), _job(3)], tmp_path, digits, at_once=2)
    assert told["deadly"][-1] == Failure(
        "its process was ended by SIGKILL, as systems do when memory runs out: try fewer --jobs"
    )
    assert [type(of_run[-1]) for of_run in told.values()] == [Failure, list, list, list]
    assert multiprocessing.active_children() == []
    shares = [message.share for message in told[_job(1).name] if isinstance(message, At)]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert len(shares) > 10, "how far it is, while it trains"


def test_an_interrupt_is_for_the_process_that_started_the_others(tmp_path: Path, digits: Dataset) -> None:
    """A terminal sends Ctrl-C to all: each would end with a traceback of its own."""
    ends: list[Message] = []
    interrupted: set[int] = set()

    def tell(job: Job, message: Message) -> None:
        if not isinstance(message, At):
            ends.append(message)
        elif message.share > 0 and not interrupted:
            for process in multiprocessing.active_children():
                interrupted.add(process.pid)
                os.kill(process.pid, signal.SIGINT)

    run_all([_job(0), _job(1)], tmp_path, digits, tell, at_once=2)
    assert len(interrupted) == 2
    assert [type(end) for end in ends] == [list, list]


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    command = ["compare", "--out", str(tmp_path), "--budget", "4", *TINY]
    assert CliRunner().invoke(main, command).exit_code == 0
    broken, other = tmp_path / "runs" / "exits-work-seed0", tmp_path / "runs" / "exits-epochs-seed0"
    (broken / CHECKPOINT_FILE).write_bytes(b"damaged")
    for run in (broken, other):
        (run / METRICS_FILE).unlink()
    failed = CliRunner().invoke(main, [*command, "--jobs", "2"])
    assert failed.exit_code == 1
    told = " ".join(failed.output.split())
    assert "exits-work-seed0: failed: " in told
    assert "checkpoint.safetensors is damaged" in told
    assert "1 of 2 runs failed, for the reasons above: exits-work-seed0. The others are kept" in told
    assert (other / METRICS_FILE).exists()


def test_ctrl_c_ends_all_processes_quietly_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """As a terminal sends it: to this process and to those that it started."""
    command = [sys.executable, "-m", "hbll", "compare", "--out", str(tmp_path), "--jobs", "2", *TINY]
    settings = ["--budget", "100000", "--set", "train.evaluations=2000"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, as do theirs
    try:
        process = subprocess.Popen(
            [*command, *settings], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        while process.poll() is None and len(list(tmp_path.glob(f"runs/*/{CHECKPOINT_FILE}"))) < 2:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.1)
        signalled = process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)  # until nobody can write to it any more
    finally:
        process.kill()
    assert signalled, output
    assert process.returncode == 130, output
    assert "Traceback" not in output
    told = " ".join(output.split())
    assert "stopped with 0 of 2 runs ended, in exits-work-seed0 at step" in told
    assert "exits-epochs-seed0 at step" in told
    assert "the same command goes on from the last checkpoints" in told
    listed = subprocess.run([*command, *settings, "--dry-run"], capture_output=True, text=True, check=True).stdout
    assert listed.count("% done") == 2
