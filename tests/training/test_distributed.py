"""Real processes that train together over gloo, on one host."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest

from benchmarks.live import free_port
from family.tree import Tree
from training.checkpoint import CHECKPOINT_FILE, load_family
from training.config import ConfigError, MlpConfig, ResMlpConfig, RunConfig, TrainConfig, dump_config
from training.dataset import Dataset
from training.distributed import Team, TeamError, join
from training.trainer import Report, train

STEPS, FEATURES = 50, 16


def _config(method: str, batch: int, work: float, **settings: object) -> RunConfig:
    """`STEPS` steps, of about so much `work` a row, in block evaluations."""
    budget = {"budget": STEPS * batch * work / 3000, "evaluations": 1}
    of_training = TrainConfig.model_validate(budget | {"method": method, "noise": 0.1, "batch": batch} | settings)
    return RunConfig(model=ResMlpConfig(width=FEATURES, hidden=16), train=of_training)


HBLL, CHAINS = _config("hbll", 32, 11), _config("hbll+chains", 32, 5)
SEVERAL = _config("chains", 32, 5, chains=3)
THIN = _config("hbll", 2, 11)
"""Two rows: with two trees of two ranks each, one rank of a tree has nothing to do for the root."""


def _start(size: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """The ranks of a team, told who they are as a launcher would."""
    team = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [_process(*arguments, environment=team | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)]


def _launch(size: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """The same by `torchrun`, which is one process to us."""
    return [_process("torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "-m", *arguments)]


def _process(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *arguments]
    told = dict(os.environ) | {"OMP_NUM_THREADS": "1"} | (environment or {})
    return subprocess.Popen(command, env=told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("config", "size", "tree_ranks", "start"),
    [(HBLL, 2, 2, _start), (CHAINS, 2, 1, _launch), (SEVERAL, 2, 1, _start), (THIN, 4, 2, _start)],
    ids=["tree", "data, by torchrun", "data, several chains", "tree and data"],
)
def test_ranks_give_the_losses_of_one_process(
    tmp_path: Path, digits: Dataset, config: RunConfig, size: int, tree_ranks: int, start: object
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(dump_config(config))
    processes = start(size, "tests.training.ranks", str(file), str(tmp_path / "run"), str(tree_ranks))
    alone: list[float] = []
    train(config, tmp_path / "alone", digits, lambda report: alone.append(report.loss))
    outputs = [process.communicate(timeout=300) for process in processes]
    said = "\n".join(error[-4000:] for _, error in outputs)
    assert [process.returncode for process in processes] == [0] * len(processes), said
    found = json.loads("".join(out for out, _ in outputs))  # one rank alone talks
    assert len(alone) >= STEPS - 15  # chains are of random length
    assert found["losses"] == pytest.approx(alone, abs=1e-5)
    assert found["threads"] == []  # one that is left aborts the interpreter when it ends, now and then
    assert found["complaint"] == f"all ranks must have the same number, got {list(range(size))} in the order of ranks"
    _, family, progress = load_family(tmp_path / "run")
    assert progress == load_family(tmp_path / "alone")[2]
    # What docs/parallel.md derives: all gradients and the loss; of D = 3, a half of the root's states and of level 1's two.
    parameters = sum(parameter.numel() for parameter in family.parameters())
    rows = config.train.batch * tree_ranks // size
    assert found["summed"] == len(alone) * 4 * (parameters + 1)
    assert found["gathered"] == (len(alone) * 4 * FEATURES * (math.ceil(rows / 2) + rows) if tree_ranks > 1 else 0)


def test_a_lost_rank_ends_the_job_which_goes_on_with_another_number_of_ranks(tmp_path: Path, digits: Dataset) -> None:
    """A real SIGKILL to one of two ranks of `hbll train`: the other says so and ends; one process takes over."""
    # Long enough that a rank can be killed in it, with a checkpoint every twenty steps.
    config = _config("hbll", 32, 11, budget=240, evaluations=100)
    file, run = tmp_path / "config.toml", tmp_path / "run"
    file.write_text(dump_config(config))
    survivor, victim = _start(2, "hbll", "train", "--config", str(file), "--out", str(run), "--tree-ranks", "2")
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
    interrupted = load_family(run)[2].steps
    assert interrupted > 0

    def losses(folder: Path) -> dict[int, float]:
        """By step, until ten after the one where the lost run is resumed."""
        found: dict[int, float] = {}

        def keep(report: Report) -> None:
            found[report.step] = report.loss
            if report.step >= interrupted + 10:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            train(config, folder, digits, keep, resume=True)
        return found

    resumed, whole = losses(run), losses(tmp_path / "whole")
    assert list(resumed) == list(range(interrupted + 1, interrupted + 11))
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, abs=1e-4)


@pytest.mark.parametrize("rows", [1, 5, 8])
@pytest.mark.parametrize("tree_ranks", [1, 2, 4, 8])
def test_the_shares_of_a_level_are_all_of_it_once(tree_ranks: int, rows: int) -> None:
    tree = Tree(4)
    for level in range(4):
        nodes = tree.level_nodes(level)
        taken = []
        for rank in range(tree_ranks):
            mine, of_mine = Team(rank, tree_ranks, tree_ranks).share(nodes, rows)
            taken += [(node, row) for node in mine for row in range(rows)[of_mine]]
        assert taken == list(product(nodes, range(rows)))


def test_the_rows_of_a_batch_go_to_trees_of_ranks() -> None:
    assert [Team(rank, 4, 2).rows(6) for rank in range(4)] == [slice(0, 3), slice(0, 3), slice(3, 6), slice(3, 6)]
    assert Team().rows(7) == slice(0, 7)


@pytest.mark.parametrize(
    ("settings", "team", "complaint"),
    [
        ({"method": "chains"}, Team(0, 2, 2), "leave --tree-ranks at 1, .* or take --method hbll or hbll-paper"),
        ({"method": "hbll+chains"}, Team(0, 4, 2), "cannot divide a level of the tree"),
        ({"method": "cffm"}, Team(0, 2), "compares all rows of a batch: train it with one rank, not 2"),
        ({"method": "hbll", "batch": 9}, Team(0, 4, 2), "2 ranks cannot divide train.batch 9"),
    ],
)
def test_what_ranks_cannot_divide_is_refused(
    tmp_path: Path, digits: Dataset, settings: dict[str, object], team: Team, complaint: str
) -> None:
    config = RunConfig(model=MlpConfig(width=8), train=TrainConfig.model_validate(settings))
    with pytest.raises(ConfigError, match=complaint):
        train(config, tmp_path / "run", digits, lambda _: None, team=team)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tree_ranks", [0, 3, 2])
def test_a_tree_needs_its_ranks(tree_ranks: int) -> None:
    with pytest.raises(TeamError, match="torchrun --nproc-per-node"), join("cpu", tree_ranks):
        pass
