"""Real processes that train together over gloo, on one host."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from training.checkpoint import CHECKPOINT_FILE, load_family
from training.config import ResMlpConfig, RunConfig, TrainConfig, dump_config
from training.data import Digits
from training.trainer import train

MODEL = ResMlpConfig(width=16, hidden=16)
STEPS = 50
HBLL = RunConfig(
    model=MODEL, train=TrainConfig(method="hbll", noise=0.1, batch=32, budget=STEPS * 32 * 11 / 3000, evaluations=1)
)
CHAINS = RunConfig(model=MODEL, train=TrainConfig(method="chains", batch=32, budget=2, evaluations=1))


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher tells a rank."""
    told = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return dict(os.environ) | {name: str(value) for name, value in told.items()}


def _start(size: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """The ranks of a team, started by hand."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env=_environment(rank, size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> dict[str, list[float]]:
    """The losses of one process, by method."""
    losses: dict[str, list[float]] = {}
    for config in (HBLL, CHAINS):
        of_run = losses.setdefault(config.train.method, [])
        folder = tmp_path_factory.mktemp(config.train.method)
        train(config, folder, digits, lambda report, keep=of_run: keep.append(report.loss))
    return losses


@pytest.fixture
def config_file(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "config.toml"
    file.write_text(dump_config(HBLL))
    return file


@pytest.mark.parametrize(
    ("config", "size", "tree_ranks"),
    [(HBLL, 2, 2), (CHAINS, 2, 1), (HBLL, 4, 2)],
    ids=["tree", "data", "tree and data"],
)
def test_ranks_give_the_losses_of_one_process(
    tmp_path: Path, alone: dict[str, list[float]], config: RunConfig, size: int, tree_ranks: int
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(dump_config(config))
    ranks = _start(size, "tests.training.ranks", str(file), str(tmp_path / "run"), str(tree_ranks))
    outputs = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size, outputs
    assert [bool(out) for out, _ in outputs] == [True] + [False] * (size - 1)
    found = json.loads(outputs[0][0])
    expected = alone[config.train.method]
    assert len(expected) >= STEPS
    assert found["losses"] == pytest.approx(expected, abs=1e-5)
    _, family, progress = load_family(tmp_path / "run")
    assert progress.steps == len(expected)
    parameters = sum(parameter.numel() for parameter in family.parameters())
    assert found["summed"] == len(expected) * 4 * (parameters + 1)
    # States of 16 features: this rank's half of 2 nodes (D=3, level 1) and of 1 node (the root), on its rows.
    gathered = len(expected) * 4 * 16 * (32 // (size // tree_ranks)) * (2 + 1) // 2
    assert found["gathered"] == (gathered if tree_ranks > 1 else 0)


def test_a_lost_rank_ends_the_job_which_goes_on_with_another_number_of_ranks(tmp_path: Path, digits: Digits) -> None:
    """A real SIGKILL to one of two ranks of `hbll train`: the other says so and ends; one process takes over."""
    config = HBLL.model_copy(update={"train": HBLL.train.model_copy(update={"budget": 60, "evaluations": 60})})
    file, run = tmp_path / "config.toml", tmp_path / "run"
    file.write_text(dump_config(config))
    command = ("hbll", "train", "--config", str(file), "--out", str(run), "--tree-ranks", "2")
    survivor, victim = _start(2, *command)
    deadline = time.monotonic() + 120
    while not (run / CHECKPOINT_FILE).exists() and survivor.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)  # polls another process, which has no other way to tell us
    victim.kill()
    victim.communicate()
    _, complaint = survivor.communicate(timeout=120)
    assert survivor.returncode == 1
    assert "Error: another rank ended" in complaint
    assert "--resume" in complaint
    assert "Traceback" not in complaint

    interrupted = load_family(run)[2]
    until = interrupted.steps + 10

    def stop(report: object) -> None:
        if report.step >= until:
            raise InterruptedError

    losses: dict[str, list[tuple[int, float]]] = {"resumed": [], "whole": []}
    for name, folder in (("resumed", run), ("whole", tmp_path / "whole")):
        with pytest.raises(InterruptedError):
            train(
                config, folder, digits, lambda r, keep=losses[name]: (keep.append((r.step, r.loss)), stop(r)), resume=True
            )
    resumed, whole = losses["resumed"], losses["whole"][interrupted.steps :]
    assert [step for step, _ in resumed] == [step for step, _ in whole]
    assert [loss for _, loss in resumed] == pytest.approx([loss for _, loss in whole], abs=1e-4)
