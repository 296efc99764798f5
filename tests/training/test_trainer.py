from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from hbll.cli import main
from tests.conftest import SMALL_VIT
from training.checkpoint import CHECKPOINT_FILE, CONFIG_FILE, load_family, load_run_config
from training.config import ConfigError, GptConfig, MethodName, MlpConfig, ResMlpConfig, RunConfig, TrainConfig
from training.data_config import DigitsConfig
from training.dataset import Dataset
from training.digits import load_digits
from training.evaluate import score_paths
from training.lock import alone_in
from training.trainer import LOG_FILE, History, Report, TrainingDiverged, learning_rate, train

SHORT = TrainConfig(budget=6, evaluations=3, hbll_share=0.5)


class Killed(Exception):
    """Stands for a kill between two steps."""


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_family(run)[1].state_dict()


@pytest.mark.parametrize("model", [SMALL_VIT, MlpConfig(width=16)], ids=["vit", "mlp"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, digits: Dataset, model: MlpConfig) -> None:
    config = RunConfig(model=model, train=SHORT)
    train(config, tmp_path / "whole", digits, lambda _: None)

    def kill_halfway(report: Report) -> None:
        if report.share > 0.55:
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "killed", digits, kill_halfway)
    steps: list[int] = []
    train(config, tmp_path / "killed", digits, lambda report: steps.append(report.step), resume=True)
    assert steps[0] > 1, "started again from nothing"
    for name, tensor in _weights(tmp_path / "whole").items():
        assert torch.equal(tensor, _weights(tmp_path / "killed")[name]), name
    assert (tmp_path / "whole" / LOG_FILE).read_text() == (tmp_path / "killed" / LOG_FILE).read_text()


def _log_rows(run: Path) -> int:
    return len((run / LOG_FILE).read_text().splitlines()) - 1 if (run / LOG_FILE).exists() else 0


def test_a_killed_process_loses_at_most_one_interval(tmp_path: Path) -> None:
    """A real process, a real SIGKILL."""
    config = tmp_path / "config.toml"
    config.write_text('[model]\nkind = "mlp"\nwidth = 16\n[train]\nbudget = 60\nevaluations = 20\n')
    run = tmp_path / "run"
    command = [sys.executable, "-m", "hbll", "train", "--config", str(config), "--out", str(run)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        # The second row of the log comes after the first checkpoint, whose own row came just before it.
        while _log_rows(run) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    _, _, progress = load_family(run)
    with (run / LOG_FILE).open() as log:
        last = list(csv.DictReader(log))[-1]
    # The log's row is written just before its checkpoint: at most that one interval, a twentieth, is lost.
    assert float(last["share"]) * 60 * 3000 - progress.evaluations <= 1.1 * 60 * 3000 / 20
    with (run / LOG_FILE).open() as log:
        shares = [float(row["share"]) for row in csv.DictReader(log)]
    assert shares == pytest.approx([n / 20 for n in range(1, len(shares) + 1)], abs=0.005)
    finished = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert load_family(run)[2].evaluations >= 60 * 3000


def test_seeds_decide_everything(tmp_path: Path, digits: Dataset) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = RunConfig(model=SMALL_VIT, train=SHORT.model_copy(update={"seed": seed, "budget": 2}))
        train(config, tmp_path / name, digits, lambda _: None)
    a, b, c = (_weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_training_learns(tmp_path: Path) -> None:
    """Centred digits and a few seconds: far above chance at every depth."""
    scores = {}

    def keep(report: Report) -> None:
        scores.update(report.scores or {})

    config = RunConfig(
        model=MlpConfig(width=64), data=DigitsConfig(shift=0), train=TrainConfig(method="hbll", budget=60, lr=3e-3)
    )
    train(config, tmp_path / "run", load_digits(0), keep)
    assert len(scores) == 25
    assert min(score.accuracy for score in scores.values()) > 0.5


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path, digits: Dataset) -> None:
    config = RunConfig(model=MlpConfig(width=8), train=TrainConfig(budget=1, evaluations=1))
    train(config, tmp_path, digits, lambda _: None)
    before = (tmp_path / CHECKPOINT_FILE).read_bytes()
    with pytest.raises(ConfigError, match="add --resume"):
        train(config, tmp_path, digits, lambda _: None)
    other = config.model_copy(update={"model": MlpConfig(width=9)})
    with pytest.raises(ConfigError, match=r"another configuration, model.width 8 \(now 9\): resume it with the same"):
        train(other, tmp_path, digits, lambda _: None, resume=True)
    assert (tmp_path / CHECKPOINT_FILE).read_bytes() == before


def test_a_run_goes_on_as_its_folder_says(tmp_path: Path) -> None:
    """Bug found: without --config, --resume compared the run with the defaults and told all differences."""
    run = tmp_path / "run"
    tiny = ["model.kind=mlp", "model.width=8", "train.budget=1", "train.evaluations=1", "train.lr=1e-3"]
    settings = [part for text in tiny for part in ("--set", text)]
    started = CliRunner().invoke(main, ["train", "--out", str(run), "--resume", *settings])
    assert started.exit_code == 0, started.output
    assert "holds no run: starting one" in " ".join(started.output.split())
    before = load_run_config(run)
    resumed = CliRunner().invoke(main, ["train", "--out", str(run), "--resume"])
    assert resumed.exit_code == 0, resumed.output
    assert "starting" not in resumed.output
    other = CliRunner().invoke(main, ["train", "--out", str(run), "--resume", "--seed", "3"])
    assert "another configuration, train.seed 0 (now 3): resume" in " ".join(other.output.split())
    assert load_run_config(run) == before


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path: Path, digits: Dataset) -> None:
    """Bug found: two trainings of one folder overwrote each other's checkpoints."""
    config = RunConfig(model=MlpConfig(width=8), train=TrainConfig(budget=1, evaluations=1))
    with alone_in(tmp_path, wait=False), pytest.raises(ConfigError, match=r"another process trains in .*choose another"):
        train(config, tmp_path, digits, lambda _: None)
    assert not (tmp_path / CONFIG_FILE).exists()
    left = tmp_path / f".{CHECKPOINT_FILE}.0123abcd.tmp"  # by one that was killed
    left.touch()
    train(config, tmp_path, digits, lambda _: None)
    assert not left.exists()


def test_of_equal_validations_the_first_is_the_best() -> None:
    """Bug found: sums in the order of a set, another in each process, told rows of the same accuracies apart."""
    shares = [f"{share / 1000:.4f}" for share in range(701, 726)]
    rng = np.random.default_rng(0)
    rows = [{f"1-{n}": share for n, share in enumerate(rng.permutation(shares).tolist())} for _ in range(30)]
    assert History(Path("log.csv"), rows).best == 0


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, digits: Dataset) -> None:
    config = RunConfig(model=SMALL_VIT, train=TrainConfig(method="chains", budget=3, lr=1e30, warmup_steps=0))
    with pytest.raises(
        TrainingDiverged, match=r"the loss is (nan|inf) at step \d+: .*The last checkpoint is intact. Try a lower train.lr"
    ):
        train(config, tmp_path, digits, lambda _: None)


def test_weights_that_are_not_finite_never_become_a_checkpoint(
    tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that breaks the weights just before a checkpoint is due: its own loss was still finite."""
    step = torch.optim.AdamW.step
    steps: list[int] = []

    def breaking(self: torch.optim.AdamW, *arguments: object) -> None:
        step(self, *arguments)
        steps.append(1)
        if len(steps) > 60:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", breaking)
    train_config = TrainConfig(method="bp", blocks=1, budget=4, evaluations=370)
    config = RunConfig(model=MlpConfig(width=8), train=train_config)
    with pytest.raises(
        TrainingDiverged, match=r"the validation loss is nan at step 61: the parameter embed\.\w+ is not finite any more"
    ):
        train(config, tmp_path, digits, lambda _: None)
    _, _, progress = load_family(tmp_path)
    assert progress.steps == 60
    assert all(tensor.isfinite().all() for tensor in _weights(tmp_path).values())


def test_bp_trains_one_path_only(tmp_path: Path, digits: Dataset) -> None:
    config = RunConfig(model=MlpConfig(width=8), train=TrainConfig(method="bp", blocks=2, budget=2, evaluations=1))
    seen: list[Report] = []
    train(config, tmp_path, digits, seen.append)
    assert list(seen[-1].scores or {}) == [(4, 6)]


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    settings = TrainConfig(lr=1.0, warmup_steps=9)
    assert [learning_rate(settings, step, 0.0) for step in range(10)] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert learning_rate(settings, 1000, 0.5) == pytest.approx(0.5)
    assert learning_rate(settings, 1000, 1.0) == pytest.approx(0.0)


FLAT = ResMlpConfig(hierarchy_depth=2, width=8, hidden=8)


def _means(run: Path) -> list[float]:
    """The mean validation accuracy over all paths, by validation."""
    with (run / LOG_FILE).open() as log:
        return [sum(float(row[path]) for path in ("2", "1-2", "2-3", "1-2-3")) / 4 for row in csv.DictReader(log)]


def test_a_run_stops_when_it_gets_no_better_and_gives_its_best(tmp_path: Path, blobs: Dataset) -> None:
    """Easily learnt, then disturbed by a rate that is far too high for what is learnt to last."""
    settings = TrainConfig(budget=300, batch=16, evaluations=30, lr=0.3, warmup_steps=0, patience=3)
    config = RunConfig(model=FLAT, data=blobs.source, train=settings)
    family = train(config, tmp_path / "run", blobs, lambda _: None)
    means = _means(tmp_path / "run")
    assert len(means) < 30, "never stopped"
    assert len(means) == means.index(max(means)) + 1 + 3
    best, final = (load_family(tmp_path / "run", weights=weights) for weights in ("best", "final"))
    assert best[2].steps < final[2].steps
    for name, tensor in load_family(tmp_path / "run")[1].state_dict().items():
        assert torch.equal(tensor, best[1].state_dict()[name])
        assert torch.equal(tensor, family.state_dict()[name])
    scores = score_paths(best[1], blobs.validation, best[1].tree.paths())
    assert sum(score.accuracy for score in scores.values()) / 4 == pytest.approx(max(means), abs=1e-3)
    steps: list[int] = []
    train(config, tmp_path / "run", blobs, lambda report: steps.append(report.step), resume=True)
    assert steps == [], "went on after it had stopped"


def test_without_patience_the_final_weights_are_used(tmp_path: Path, blobs: Dataset) -> None:
    config = RunConfig(model=FLAT, data=blobs.source, train=TrainConfig(budget=8, batch=16, evaluations=4))
    train(config, tmp_path, blobs, lambda _: None)
    assert (tmp_path / "best.safetensors").exists()
    final = load_family(tmp_path, weights="final")
    assert load_family(tmp_path)[2] == final[2]


def test_clipping_bounds_what_a_step_can_do(tmp_path: Path, blobs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def measuring(self: torch.optim.AdamW, *arguments: object) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", measuring)
    for name, clip in (("free", None), ("clipped", 0.01)):
        settings = TrainConfig(budget=4, batch=16, evaluations=1, clip=clip)
        train(RunConfig(model=FLAT, data=blobs.source, train=settings), tmp_path / name, blobs, lambda _: None)
        assert (max(norms) <= 0.0101) == (clip is not None)
        norms.clear()


@pytest.mark.parametrize("method", ["hbll", "chains", "cffm", "exits"])
def test_bf16_trains_float32_weights(tmp_path: Path, blobs: Dataset, method: MethodName) -> None:
    accuracies: list[float] = []

    def keep(report: Report) -> None:
        if report.scores:
            accuracies.append(max(score.accuracy for score in report.scores.values()))

    for precision in ("float32", "bf16"):
        settings = TrainConfig(
            method=method, budget=60, batch=16, evaluations=1, lr=1e-2, warmup_steps=0, precision=precision
        )
        train(RunConfig(model=FLAT, data=blobs.source, train=settings), tmp_path / precision, blobs, keep)
    assert min(accuracies) > 0.8
    half, full = _weights(tmp_path / "bf16"), _weights(tmp_path / "float32")
    assert all(tensor.dtype == torch.float32 for tensor in half.values())
    assert not all(torch.equal(tensor, full[name]) for name, tensor in half.items())


def test_a_gpt_family_is_sent_to_the_loop_that_trains_all_its_positions(digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hbll reproduce table9"):
        train(RunConfig(model=GptConfig()), tmp_path, digits, lambda _: None)
    assert list(tmp_path.iterdir()) == []
