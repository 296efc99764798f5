"""The training methods by name: for each, what a step does, what it costs, and which paths it trains.

The trainer's loop is the same for all; the losses themselves are in `training.objective`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from family.tree import InvalidPath, Path, Tree
from training.config import ConfigError, MethodName, RunConfig, TrainConfig
from training.distributed import ALONE, Team
from training.model import Family
from training.objective import (
    Step,
    chain_evaluations,
    chains_step,
    contrastive_step,
    hbll_evaluations,
    hbll_probability,
    hbll_step,
    ladder_step,
    path_step,
    sample_chains,
    sample_path,
)

PUBLISHED_NUDGE = 0.25
"""The paper's c (eq. 30, the Gaussian case)."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a step gets besides the batch: the run's settings, the family, the step's own sources of randomness, and the
    team, of whose batch it gets this rank's rows."""

    settings: TrainConfig
    family: Family
    rng: np.random.Generator
    generator: torch.Generator
    team: Team = ALONE


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train a family.

    `step` takes a batch of images and labels `(rows, ...)`; of each image it gets `views` differently shifted rows.
    `evaluations` is the number of block evaluations that a step spends on an image, on average. `paths` are those that
    the method trains; none: all. `divided_by` says what of a step ranks can divide among them.
    """

    summary: str
    step: Callable[[Context, Tensor, Tensor], Step]
    evaluations: Callable[[TrainConfig, Tree], float]
    paths: Callable[[TrainConfig, Tree], tuple[Path, ...]] | None = None
    views: int = 1
    divided_by: tuple[Literal["data", "tree"], ...] = ("data",)


def _hbll(context: Context, x: Tensor, y: Tensor) -> Step:
    settings, generator, team = context.settings, context.generator, context.team
    return hbll_step(context.family, x, y, nudge=settings.nudge, noise=settings.noise, generator=generator, team=team)


def _hbll_as_published(context: Context, x: Tensor, y: Tensor) -> Step:
    noise, generator, team = context.settings.noise, context.generator, context.team
    return hbll_step(
        context.family, x, y, nudge=PUBLISHED_NUDGE, noise=noise, generator=generator, over_features="sum", team=team
    )


def _mixed(context: Context, x: Tensor, y: Tensor, share: float) -> Step:
    """An HBLL step, as often as gives these `share` of the work, or sampled chains.

    Where exits have heads of their own the chains alone train these, if there are chains: a local step would fit each to
    the ladder's states, nudged as they are, and other paths end there too.
    """
    family, rng, team = context.family, context.rng, context.team
    if rng.random() < hbll_probability(family.tree, share):
        step = _hbll(context, x, y)
        if share < 1 and not family.shares_head:
            family.head.zero_grad(set_to_none=False)
        return step
    chains = sample_chains(family.tree, rng, context.settings.chains, len(x) * team.data_ranks)
    return chains_step(family, chains, x, y, team=team)


def _mixed_evaluations(tree: Tree, share: float) -> float:
    p = hbll_probability(tree, share)
    return p * hbll_evaluations(tree) + (1 - p) * chain_evaluations(tree)


def _one_network(settings: TrainConfig, tree: Tree) -> tuple[Path, ...]:
    """The one path of `train.blocks` blocks (none: all): a rung of the ladder where there is one."""
    blocks = settings.blocks or len(tree.nodes)
    return (tree.ladder[blocks - 1] if blocks <= tree.hierarchy_depth else tree.path_at(blocks, 0),)


def _network_of(context: Context) -> Path:
    return _one_network(context.settings, context.family.tree)[0]


METHODS: dict[MethodName, Method] = {
    "hbll+chains": Method(
        "HBLL steps for a share of the budget, mixed with sampled chains for the rest (default)",
        lambda context, x, y: _mixed(context, x, y, context.settings.hbll_share),
        lambda settings, tree: _mixed_evaluations(tree, settings.hbll_share),
    ),
    "hbll": Method(
        "Hierarchical Block-Local Learning alone: no gradient leaves a block and its right parent",
        _hbll,
        lambda _, tree: hbll_evaluations(tree),
        divided_by=("data", "tree"),
    ),
    "hbll-paper": Method(
        "the same as published: latent losses summed over features, c = 1/4",
        _hbll_as_published,
        lambda _, tree: hbll_evaluations(tree),
        divided_by=("data", "tree"),
    ),
    "chains": Method(
        "backpropagation through sampled paths, one or `train.chains` a step, with every exit on the way",
        lambda context, x, y: _mixed(context, x, y, share=0),
        lambda _, tree: chain_evaluations(tree),
    ),
    "paths": Method(
        "the same without exits on the way, for paths of uniform depth",
        lambda context, x, y: path_step(context.family, sample_path(context.family.tree, context.rng), x, y),
        lambda _, tree: tree.n / 2,
    ),
    "exits": Method(
        "backpropagation through the ladder with a loss at every rung; trains no path but the ladder's",
        lambda context, x, y: ladder_step(context.family, x, y),
        lambda _, tree: tree.hierarchy_depth,
        lambda _, tree: tree.ladder,
    ),
    "cffm": Method(
        "contrastive forward-forward: one network of --blocks blocks (or all), each by a loss of its own",
        lambda context, x, y: contrastive_step(context.family, _network_of(context), x, y),
        lambda settings, tree: 2 * len(_one_network(settings, tree)[0]),
        _one_network,
        views=2,
        divided_by=(),  # its loss compares every row of a batch with every other
    ),
    "bp": Method(
        "one ordinary network of --blocks blocks, the baseline",
        lambda context, x, y: path_step(context.family, _network_of(context), x, y),
        lambda settings, tree: len(_one_network(settings, tree)[0]),
        _one_network,
    ),
}
"""By name: those of `training.config.BUILT_IN`, and the user's that `training.custom.import_method` adds."""


def method_of(settings: TrainConfig) -> Method:
    """The method of a run.

    Raises:
        ConfigError: it is code of the user's, which nobody has named.
    """
    try:
        return METHODS[settings.method]
    except KeyError as exc:
        raise ConfigError(
            f"{settings.method} is a method of your own. Training with it runs that code, so name it: --method "
            f"{settings.method}; or in Python, training.custom.import_method({settings.method!r})"
        ) from exc


def trained_paths(config: RunConfig, tree: Tree, paths: tuple[Path, ...]) -> tuple[Path, ...]:
    """Those of `paths` that the run trains: all, or the few of a method that trains no others.

    Raises:
        ConfigError: a method of the user's names none, or one that the tree does not have.
    """
    few = method_of(config.train).paths
    if few is None:
        return paths
    try:
        found = tuple(map(tree.validate, few(config.train, tree)))
    except InvalidPath as exc:
        raise ConfigError(f"the paths of method {config.train.method}: {exc}") from exc
    if not found:
        raise ConfigError(f"the paths of method {config.train.method}: expected at least one, got none")
    return found


def steps_of(config: RunConfig, tree: Tree, images: int) -> int:
    """How many steps a run takes, about: exactly where all steps of its method cost the same."""
    settings = config.train
    of_a_step = method_of(settings).evaluations(settings, tree) * settings.batch
    return max(1, -int(-settings.budget * images // of_a_step))
