from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.training.test_trainer import Killed
from training.checkpoint import CHECKPOINT_FILE
from training.loop import Recipe, fit, rows_at
from training.trainer import TrainingDiverged

RECIPE = Recipe(steps=12, batch=4, lr=0.01, warmup_steps=2, clip=1.0, seed=3, checkpoints=3)


class Line(nn.Module):
    """`y = w x`, and a parameter that no step reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.unused = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(2))

    def step(self, index: int, rng: np.random.Generator) -> Tensor:
        x = torch.from_numpy(rng.standard_normal((4, 3))).float() + rows_at(RECIPE, index, 10)[:, None]
        loss = ((x @ self.weight - x.sum(dim=1)) ** 2).mean()
        loss.backward()
        return loss.detach()


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, killed, resumed = Line(), Line(), Line()
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    fit(whole, RECIPE, whole.step, tmp_path / "whole", lambda _: None)

    def kill(share: float) -> None:
        if share > 0.7:
            raise Killed

    with pytest.raises(Killed):
        fit(killed, RECIPE, killed.step, tmp_path / "killed", kill)
    shares: list[float] = []
    fit(resumed, RECIPE, resumed.step, tmp_path / "killed", shares.append)
    assert shares[0] == pytest.approx(9 / 12), "the second of three checkpoints is of step 8"
    assert torch.equal(whole.weight, resumed.weight)
    assert not torch.equal(whole.weight, torch.zeros(3))


def test_a_run_that_is_done_is_not_trained_again(tmp_path: Path) -> None:
    first, second = Line(), Line()
    fit(first, RECIPE, first.step, tmp_path, lambda _: None)
    fit(second, RECIPE, lambda *_: pytest.fail("trained again"), tmp_path, lambda _: None)
    assert torch.equal(first.weight, second.weight)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    line = Line()

    def step(index: int, rng: np.random.Generator) -> Tensor:
        return torch.tensor(float("nan")) if index == 5 else line.step(index, rng)

    with pytest.raises(TrainingDiverged, match="the loss is nan at step 5"):
        fit(line, RECIPE, step, tmp_path, lambda _: None)
    assert (tmp_path / CHECKPOINT_FILE).exists()


def test_an_epoch_takes_every_row_at_most_once_and_the_next_in_another_order() -> None:
    epochs = [torch.cat([rows_at(RECIPE, epoch * 2 + i, 9) for i in range(2)]).tolist() for epoch in range(2)]
    for rows in epochs:
        assert len(set(rows)) == 8
        assert set(rows) <= set(range(9))
    assert epochs[0] != epochs[1]
    assert len(rows_at(RECIPE, 0, rows=2)) == 2, "a batch larger than the data is all of them"
