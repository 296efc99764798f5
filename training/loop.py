"""The loop that trains modules which are no image families: AdamW, warm-up, cosine, clipping, and checkpoints.

As in `training.trainer`, all randomness of a step comes from (seed, step), so a run that was killed goes on as if it had
not been. What a step computes, and on which data, is its caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from training.checkpoint import CHECKPOINT_FILE, Progress, load_checkpoint, save_checkpoint
from training.trainer import TrainingDiverged


class Recipe(BaseModel):
    """How a module is trained: AdamW with a linear warm-up and, unless `cosine` is false, a cosine to zero."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    lr: float = Field(gt=0)
    weight_decay: float = Field(0.01, ge=0)
    beta2: float = Field(0.999, gt=0, lt=1)
    warmup_steps: int = Field(0, ge=0)
    cosine: bool = True
    clip: float | None = Field(None, gt=0, description="longest gradient of all parameters together; none: any")
    seed: int = Field(0, ge=0)
    checkpoints: int = Field(4, ge=1, description="how often in a run one is written")


def fit(
    module: nn.Module,
    recipe: Recipe,
    step: Callable[[int, np.random.Generator], Tensor],
    folder: Path,
    on_share: Callable[[float], None],
    evaluations: int = 0,
) -> None:
    """Train `module`, going on from the checkpoint in `folder` if there is one.

    `step(index, rng)` runs one batch forward *and* backward and returns its loss, detached. `on_share` is told which share
    of the steps is done. `evaluations` of blocks that a step takes, if the module has any, are counted in its checkpoints.

    Raises:
        CheckpointError: the checkpoint is damaged.
        TrainingDiverged: a loss is not finite; the last checkpoint is intact.
    """
    optimizer = torch.optim.AdamW(
        module.parameters(), recipe.lr, betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay, fused=True
    )
    done = load_checkpoint(folder, module, optimizer).steps if (folder / CHECKPOINT_FILE).exists() else 0
    module.train()
    every = -(-recipe.steps // recipe.checkpoints)
    for parameter in module.parameters():  # so that one which no step reaches has optimizer state, too
        parameter.grad = torch.zeros_like(parameter)
    for index in range(done, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(recipe, index)
        optimizer.zero_grad(set_to_none=False)
        loss = step(index, np.random.default_rng([recipe.seed, index, 1])).item()
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the loss is {loss} at step {index}; the last checkpoint is intact")
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), recipe.clip)
        optimizer.step()
        if (index + 1) % every == 0 or index + 1 == recipe.steps:
            save_checkpoint(folder, module, optimizer, Progress(index + 1, (index + 1) * evaluations))
        on_share((index + 1) / recipe.steps)
    module.eval()


def rows_at(recipe: Recipe, index: int, rows: int) -> Tensor:
    """Which of `rows` examples step `index` gets, `(batch,) int64`: epochs are permutations drawn from (seed, epoch)."""
    batch = min(recipe.batch, rows)
    epoch, position = divmod(index, rows // batch)
    return _order(recipe.seed, epoch, rows)[position * batch : (position + 1) * batch]


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, rows: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, epoch, 0]).permutation(rows))


def _rate(recipe: Recipe, index: int) -> float:
    warmup = min(1.0, (index + 1) / (recipe.warmup_steps + 1))
    return recipe.lr * warmup * (0.5 * (1 + math.cos(math.pi * index / recipe.steps)) if recipe.cosine else 1.0)


def device() -> torch.device:
    """Where the modules of this loop train: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
