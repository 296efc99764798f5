"""Local rules compared: does any give a family whose accuracy rises with depth, as backpropagation along paths does?

HBLL as published is nearly flat in depth: for a block of a left subtree the identity solves its latent loss. The rules here
are what one might do about that while gradients stay local: none reaches more than two blocks. They are research, not
methods of `hbll train`; what they gave is in the documentation, beside the method that is trained by default.

All train the same residual MLP at equal work, counted in block evaluations (forward and backward on a row; forward alone
1/3).
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from family.choice import best_by_depth
from family.tree import Path, Tree, format_path
from training.blocks import ResidualBlocks
from training.compare import separate_blocks
from training.config import ResMlpConfig
from training.data_config import DigitsConfig
from training.dataset import Dataset, Split
from training.evaluate import score
from training.experiments.experiment import Cell, Experiment, OnShare, Scale, Trial
from training.experiments.source import data_of, describe
from training.loop import Recipe, fit, rows_at
from training.model import Family, build_family
from training.objective import chain_evaluations, chain_step, hbll_evaluations, sample_chain

RATES = 4e-3, 8e-3
"""Peak learning rates; each run takes the one with the better validation accuracy."""

_NUDGE = 0.5
_TEACHER_KEEPS = 0.99  # of its weights, in a step
_INIT_SCALE = 4.0  # of the output layers of left-subtree blocks
_FORWARD = 1 / 3  # of a block evaluation


class Learner(nn.Module):
    """A family in training, and what some of the rules need beside it.

    `shifts`, `(N, N + 1, width)`, is added to the state that makes a hop (start, end), before its block; zero at first.
    `teacher` has the weights of the family, averaged over the latest steps, and is not trained.
    """

    def __init__(self, family: Family, rule: Rule) -> None:
        super().__init__()
        assert isinstance(family.blocks, ResidualBlocks)
        self.family, tree = family, family.tree
        width = family.blocks.state_shape[-1]
        self.shifts = nn.Parameter(torch.zeros(tree.n, tree.n + 1, width)) if rule.conditioned else None
        if rule.wakes_left_subtrees:
            with torch.no_grad():
                family.blocks.down_weight[[node - 1 for node in left_nodes(tree)]] *= _INIT_SCALE
        self._teacher: list[Family] = []  # not a module of this one: neither trained nor saved

    def hop(self, start: int, end: int, state: Tensor) -> Tensor:
        """The block of node `end` on a state of node `start`, `(batch, width)` both."""
        if self.shifts is not None:
            state = state + self.shifts[start, end]
        return self.family.blocks.at(end, state)

    def follow(self, path: Path, state: Tensor) -> list[Tensor]:
        """The states `(batch, width)` of the path's nodes, from that of node 0 on."""
        states = []
        for start, end in zip((0, *path), path, strict=False):
            state = self.hop(start, end, state)
            states.append(state)
        return states

    @torch.no_grad()
    def taught(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The teacher's states along the full path and its log-probabilities there, after it took in a step's weights."""
        if not self._teacher:
            self._teacher.append(copy.deepcopy(self.family).requires_grad_(False))
        (teacher,) = self._teacher
        for ours, kept in zip(self.family.parameters(), teacher.parameters(), strict=True):
            kept.lerp_(ours, 1 - _TEACHER_KEEPS)
        state, states = teacher.embed(x), []
        for node in teacher.tree.full:
            state = teacher.blocks.at(node, state)
            states.append(state)
        return states, teacher.head(state).log_softmax(dim=-1)


def left_nodes(tree: Tree) -> list[int]:
    """The nodes off the ladder: their blocks have a block as right parent, not the head."""
    return [node for node in tree.nodes if node not in tree.ladder[-1]]


def tree_step(learner: Learner, x: Tensor, y: Tensor, *, labels: bool = False, taught: bool = False) -> Tensor:
    """HBLL's step (`training.objective.hbll_step`), node by node.

    With `labels` every node's own output learns the label, too. With `taught` the targets are the teacher's: the states
    of its full path, however few hops lead there, and beside the label its full path's distribution.
    """
    family, tree, batch = learner.family, learner.family.tree, len(y)
    above, answer = learner.taught(x) if taught else ([], None)
    embedded = family.embed(x)
    states = {0: embedded.detach()}
    total = x.new_zeros(())
    for level in reversed(range(tree.hierarchy_depth)):
        for node in tree.level_nodes(level):
            left, right = tree.parents(node)
            activation = learner.hop(left, node, embedded if node == tree.root else states[left])
            leaf = activation.detach().requires_grad_()
            if right < tree.n:
                loss = F.mse_loss(learner.hop(node, right, leaf), above[right - 1] if taught else states[right])
                loss = loss + F.cross_entropy(family.head(leaf), y) if labels else loss
            else:
                logits = family.head(leaf)
                loss = F.cross_entropy(logits, y)
                loss = loss + _distance(logits, answer) if answer is not None else loss
            loss.backward()
            assert leaf.grad is not None
            activation.backward(leaf.grad)
            states[node] = leaf.detach() - _NUDGE * batch * leaf.grad
            total += loss.detach()
    return total


def cut_step(
    learner: Learner, x: Tensor, y: Tensor, rng: np.random.Generator, *, every: int, distilled: bool = False
) -> Tensor:
    """A sampled chain with the head at each of its nodes, whose gradients are cut after `every` blocks.

    `distilled`: the shallower answers learn the deepest one's distribution as well, as in `training.objective.chain_step`.
    """
    family, path = learner.family, sample_chain(learner.family.tree, rng)
    state, answers = family.embed(x), []
    for index, (start, end) in enumerate(zip((0, *path), path, strict=False)):
        state = learner.hop(start, end, state.detach() if index and index % every == 0 else state)
        answers.append(family.head(state))
    *shallower, deepest = answers
    loss = F.cross_entropy(deepest, y)
    for logits in shallower:
        right = F.cross_entropy(logits, y)
        loss = loss + (0.5 * right + 0.5 * _distance(logits, deepest.detach().log_softmax(dim=-1)) if distilled else right)
    loss.backward()
    return loss.detach()


def overlapping_step(learner: Learner, x: Tensor, y: Tensor, rng: np.random.Generator) -> Tensor:
    """A sampled chain in which every block learns the label through the next one: HBLL's reach, other targets."""
    family, path = learner.family, sample_chain(learner.family.tree, rng)
    state, total = family.embed(x), x.new_zeros(())
    hops = list(zip((0, *path), path, strict=False))
    for index, (start, end) in enumerate(hops):
        state = learner.hop(start, end, state)
        loss = F.cross_entropy(family.head(state), y) if index == 0 else x.new_zeros(())
        if index + 1 < len(hops):
            loss = loss + F.cross_entropy(family.head(learner.hop(*hops[index + 1], state)), y)
        if loss.requires_grad:
            loss.backward()
        state = state.detach()
        total += loss.detach()
    return total


def _distance(logits: Tensor, taught: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of logits from given log-probabilities, a mean over rows."""
    return F.kl_div(logits.log_softmax(dim=-1), taught, reduction="batchmean", log_target=True)


@dataclass(frozen=True, slots=True)
class Rule:
    """A way to train: `step` runs a batch forward and backward, and `evaluations` is what that costs a row on average.

    `work`: how many times the budget it gets. `conditioned`, `wakes_left_subtrees`: see `Learner`.
    """

    title: str
    step: Callable[[Learner, Tensor, Tensor, np.random.Generator], Tensor]
    evaluations: Callable[[Tree], float]
    work: int = 1
    conditioned: bool = False
    wakes_left_subtrees: bool = False


def _hbll(learner: Learner, x: Tensor, y: Tensor, _: np.random.Generator) -> Tensor:
    return tree_step(learner, x, y)


def _cut(title: str, *, every: int, distilled: bool = False) -> Rule:
    return Rule(title, partial(cut_step, every=every, distilled=distilled), chain_evaluations)


RULES: dict[str, Rule] = {
    "hbll": Rule("HBLL", _hbll, hbll_evaluations),
    "hbll-more": Rule("HBLL, three times the work", _hbll, hbll_evaluations, work=3),
    "hbll-awake": Rule(
        "HBLL, left subtrees begin far from the identity", _hbll, hbll_evaluations, wakes_left_subtrees=True
    ),
    "hbll-conditioned": Rule("HBLL, a shift for each hop", _hbll, hbll_evaluations, conditioned=True),
    "hbll-labels": Rule(
        "HBLL, and the label at each node", lambda learner, x, y, _: tree_step(learner, x, y, labels=True), hbll_evaluations
    ),
    "hbll-taught": Rule(
        "HBLL, targets of an averaged teacher's full path",
        lambda learner, x, y, _: tree_step(learner, x, y, taught=True),
        lambda tree: hbll_evaluations(tree) + _FORWARD * len(tree.nodes),
    ),
    "overlapping": Rule(
        "chains, the label through the next block", overlapping_step, lambda tree: 2 * chain_evaluations(tree) - 1
    ),
    "cut-1": _cut("chains, cut after each block", every=1),
    "cut-1-distilled": _cut("chains, cut after each block, distilled", every=1, distilled=True),
    "cut-2": _cut("chains, cut after two blocks", every=2),
    "cut-2-distilled": _cut("chains, cut after two blocks, distilled", every=2, distilled=True),
    "chains": Rule(
        "`chains`: not local, for comparison",
        lambda learner, x, y, rng: chain_step(learner.family, sample_chain(learner.family.tree, rng), x, y).loss,
        chain_evaluations,
    ),
}


class RuleTrial(Trial):
    """A family trained by one rule at each of `RATES`."""

    rule: str
    model: ResMlpConfig
    data: DigitsConfig
    budget: float
    batch: int
    seed: int

    def measure(self, folder: FilePath, on_share: OnShare) -> list[Cell]:
        """Train at every rate; of the one with the best validation accuracy, what the test images say."""
        data, rule = data_of(self.data), RULES[self.rule]
        runs = []
        for index, lr in enumerate(RATES):

            def on_step(share: float, index: int = index) -> None:
                on_share((index + share) / len(RATES))

            learner = self._train(rule, lr, data, folder / f"lr{lr:g}", on_step)
            validation = _accuracies(learner, data.validation)
            best = best_by_depth(learner.family.tree, validation)
            best = {depth: best[depth] for depth in separate_blocks(learner.family.tree)}
            runs.append((statistics.mean(validation[path] for path in best.values()), lr, learner, best))
        _, _, learner, best = max(runs, key=lambda run: run[:2])
        test = _accuracies(learner, data.test)
        found = {f"{depth} block{'s' * (depth > 1)}": test[path] for depth, path in best.items()}
        found["all paths"] = statistics.mean(test.values())
        found["rise"] = test[best[max(best)]] - test[best[min(best)]]
        found["left blocks move"] = _moved(learner, data.test)
        return [Cell(row=rule.title, column=column, value=100 * value) for column, value in found.items()]

    def _train(self, rule: Rule, lr: float, data: Dataset, folder: FilePath, on_share: OnShare) -> Learner:
        family = build_family(self.model, self.seed, data.spec)
        learner, rows = Learner(family, rule), len(data.train)
        steps = max(1, round(rule.work * self.budget * rows / (self.batch * rule.evaluations(family.tree))))
        # One checkpoint, the last: the teacher is in none, so a run that was killed begins again.
        recipe = Recipe(steps=steps, batch=self.batch, lr=lr, warmup_steps=min(100, steps), seed=self.seed, checkpoints=1)

        def step(index: int, rng: np.random.Generator) -> Tensor:
            at = rows_at(recipe, index, rows)
            return rule.step(learner, data.augment(data.train.x[at], rng), data.train.labels[at], rng)

        folder.mkdir(parents=True, exist_ok=True)
        fit(learner, recipe, step, folder, on_share)
        return learner


@torch.no_grad()
def _accuracies(learner: Learner, split: Split) -> dict[Path, float]:
    """The share of right answers of every path, 0..1."""
    state = learner.family.embed(split.x)

    def accuracy(path: Path) -> float:
        answers: Tensor = learner.family.head(learner.follow(path, state)[-1])
        return score(answers, split.labels).accuracy

    return {path: accuracy(path) for path in learner.family.tree.paths()}


@torch.no_grad()
def _moved(learner: Learner, split: Split) -> float:
    """How far the blocks of left subtrees move a state on the full path, in relation to its norm: the mean over them."""
    tree, before = learner.family.tree, learner.family.embed(split.x)
    moved: list[float] = []
    for node, after in zip(tree.full, learner.follow(tree.full, before), strict=True):
        if node not in tree.ladder[-1]:
            moved.append(((after - before).norm(dim=1) / before.norm(dim=1)).mean().item())
        before = after
    return statistics.mean(moved)


def local_rules(scale: Scale) -> Experiment:
    """Every rule on uncentred digits, where depth matters; not an experiment of the paper's."""
    budget, seeds = {"smoke": (1.0, 1), "small": (520.0, 3), "paper": (520.0, 10)}[scale]
    model, data = ResMlpConfig(hierarchy_depth=3), DigitsConfig(shift=4)
    if scale == "smoke":
        model = ResMlpConfig(hierarchy_depth=2, width=8, hidden=16)
    trials = tuple(
        RuleTrial(name=f"{rule}-seed{seed}", rule=rule, model=model, data=data, budget=budget, batch=64, seed=seed)
        for seed in range(seeds)
        for rule in RULES
    )
    full = format_path(Tree(model.hierarchy_depth).full)
    return Experiment(
        name="local-rules",
        scale=scale,
        title=f"local rules on a residual MLP, D = {model.hierarchy_depth}: does the family rise with depth?",
        quantity="%",
        data=f"{describe(data)}, moved by up to 4 pixels, in test too; width {model.width}, hidden {model.hidden}; "
        f"{budget:g} block evaluations per training image, batch 64, AdamW with weight decay 0.01.",
        stand_in=False,
        trials=trials,
        published={},
        notes=(
            "Blocks: test accuracy of the path of that depth that is best on validation data. All paths: their mean. Rise: "
            "the deepest path's less the shallowest's. The picture leaves out what is below 86 %.",
            f"Left blocks move: the change of a state by the blocks off the ladder, on the path {full}, in % of its norm. "
            "Where that is near 0 they are the identity, and depth buys nothing.",
            f"Of two rates, {RATES[0]:g} and {RATES[1]:g}, each run has the one with the better validation accuracy. 100 "
            "warm-up steps and a cosine to zero.",
            "HBLL is method `hbll`: latent losses are means over features, c = 1/2, no noise. A teacher's weights are a "
            f"running mean, {_TEACHER_KEEPS:g} of which are kept in a step; left subtrees that begin far from the identity "
            f"have output layers drawn {_INIT_SCALE:g} times as large.",
        ),
        plotted=tuple(f"{depth} block{'s' * (depth > 1)}" for depth in separate_blocks(Tree(model.hierarchy_depth))),
        plotted_from=86.0 if scale != "smoke" else None,
    )
