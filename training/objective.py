"""The losses that train a family: HBLL's local ones, backpropagation along paths, and contrastive forward-forward.

Each function named `..._step` runs one batch forward *and* backward, adds into the gradients of the family's parameters,
and returns the loss with the work done, in block evaluations (one block forward and backward on one row).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from family.tree import Path, Tree
from training.distributed import ALONE, Team
from training.model import Family

CONTRAST_TEMPERATURE = 0.15
CONTRAST_MARGINS = 0.4, 0.1
"""Of contrastive forward-forward, at its first and at its last layer: the defaults of its authors' published code."""


@dataclass(frozen=True, slots=True)
class Step:
    """`loss`: the batch's scalar loss, detached. `evaluations`: block evaluations spent on it; of a rank of a team, those
    of the whole batch divided by the number of its shares."""

    loss: Tensor
    evaluations: float


def hbll_step(
    family: Family,
    x: Tensor,
    y: Tensor,
    *,
    nudge: float,
    noise: float,
    generator: torch.Generator,
    over_features: Literal["mean", "sum"] = "mean",
    team: Team = ALONE,
    at_once: int | None = None,
) -> Step:
    """One step of Hierarchical Block-Local Learning (arXiv 2606.21497, Algorithm 1; eqs. 10, 11, 29-31).

    Level by level from the root, all nodes of a level in one batched call. Node n reads its left parent's state,
    predicts its right parent's (node N: the label, through the head), and its loss reaches no other block than
    `f_n` and that right parent's. Children read `z_n = stop_grad(a_n - c * dloss_n/da_n + sigma/sqrt(2) * eps)`.

    As published, the latent loss is the squared norm `||f_j(a_n) - stop_grad(z_j)||^2`, a sum over features, and c is 1/4:
    `over_features="sum", nudge=0.25`. Method `hbll` deviates from that in two points: the latent loss is a mean over
    features (a little better for residual blocks in trials), and c is 0.5 (no measurable difference).

    Our reading, in both: the step has a minus sign, so that it lessens the disagreement with the right parent (the paper
    prints a plus). The embedding, of which the paper says nothing, is trained by the root node's loss alone (training it
    from every node that reads z_0 was unstable). Where states are tokens, the norm is that of a token, averaged over
    tokens: summed over these too it drowns the cross-entropy.

    Args:
        x: the family's input, `(batch, ...)`: this rank's rows.
        y: labels `(batch,) int64`.
        nudge: c, on each example's own gradient.
        noise: sigma.
        generator: source of eps.
        over_features: how the latent loss is reduced over the features of a state (of a token).
        team: the ranks that divide every level among them; loss and gradients are those of this rank's share.
        at_once: nodes of a level in one batched call (none: all); 1 is node by node: slower, with less memory.
    """
    tree, batch = family.tree, len(y)
    embedded = family.embed(x)
    states = embedded.new_empty((tree.n, *embedded.shape))  # z_0 .. z_{N-1}, detached
    states[0] = embedded.detach()
    total = embedded.new_zeros(())
    for level in reversed(range(tree.hierarchy_depth)):
        nodes = tree.level_nodes(level)
        mine, rows = team.share(nodes, batch)
        if noise and level > 0:  # drawn for all rows and nodes, so that it does not depend on who takes which
            eps = torch.randn((len(nodes), batch * team.data_ranks, *states.shape[2:]), generator=generator)
            eps = eps[:, team.rows(eps.shape[1])].to(states.device)
        posteriors = []
        for part in _parts(mine, at_once or len(mine)) if rows.stop > rows.start else ():
            leaf, loss = _local_losses(family, part, embedded[rows], states[:, rows], y[rows], batch, over_features)
            total += loss
            if level == 0:  # nobody reads the states of leaves
                continue
            assert leaf.grad is not None
            posterior = leaf.detach() - nudge * batch * leaf.grad  # the loss is a batch mean: times batch is per example
            if noise:
                first = nodes.index(part[0])
                posterior = posterior + noise / 2**0.5 * eps[first : first + len(part), rows]
            posteriors.append(posterior)
        if level > 0:
            ours = torch.cat(posteriors) if posteriors else states[:1, rows]  # none of the rows
            states[nodes.start : nodes.stop : nodes.step] = team.gather(ours, len(nodes), batch)
    return Step(total, hbll_evaluations(tree) * batch)


def _parts(nodes: range, size: int) -> list[range]:
    return [nodes[first : first + size] for first in range(0, len(nodes), size)]


def _local_losses(
    family: Family,
    nodes: range,
    embedded: Tensor,
    states: Tensor,
    y: Tensor,
    batch: int,
    over_features: Literal["mean", "sum"],
) -> tuple[Tensor, Tensor]:
    """Forward and backward of some nodes of one level, on some rows of the batch: their outputs, and their summed loss.

    The outputs `(nodes, rows, ...)` are leaves whose `.grad` is that of the loss. `states` is `(N, rows, ...)`, filled for
    all coarser levels. Rows' losses are summed and divided by `batch`: a share of the mean over the batch.
    """
    tree = family.tree
    span = nodes.step // 2
    above = states[nodes.start - span : nodes.stop - span : nodes.step]
    activations = family.blocks.at_each(nodes, embedded.unsqueeze(0) if nodes[0] == tree.root else above)
    # A detached leaf between f_n and its right parent: its gradient is both what f_n's backward pass needs and
    # the nudge of the posterior sample, so neither costs a pass of its own.
    leaf = activations.detach().requires_grad_()
    rights = range(nodes[0] + span, min(nodes[-1] + span + 1, tree.n), nodes.step)
    loss = embedded.new_zeros(())
    if len(rights) < len(nodes):  # the last node of a level
        loss = F.cross_entropy(family.head_at(nodes[-1])(leaf[-1]), y, reduction="sum") / batch
    if rights:
        predictions = family.blocks.at_each(rights, leaf[: len(rights)])
        targets = states[rights.start : rights.stop : rights.step]
        features = states.shape[2:] if over_features == "mean" else states.shape[2:-1]  # a mean over tokens in both
        loss = loss + F.mse_loss(predictions, targets, reduction="sum") / (batch * math.prod(features))
    loss.backward()
    assert leaf.grad is not None
    if activations.requires_grad:  # not where all that is before them is frozen
        activations.backward(leaf.grad)
    return leaf, loss.detach()


def chain_step(family: Family, path: Path, x: Tensor, y: Tensor) -> Step:
    """Backpropagation through one path, with every exit that the path passes: see `chains_step`."""
    return chains_step(family, [(path, slice(0, len(x)))], x, y)


def chains_step(family: Family, chains: Iterable[tuple[Path, slice]], x: Tensor, y: Tensor, *, team: Team = ALONE) -> Step:
    """Backpropagation through some paths, each for its rows of the batch, with every exit that a path passes.

    A node from which the head can be reached in one hop is an exit: `0 -> ... -> n -> N` is a valid path too, whose
    answer costs nothing more. The deepest exit learns the label; each shallower one half the label and half the
    deepest exit's distribution (self-distillation, temperature 1). A row's loss is their plain sum, the batch's the mean.

    Args:
        chains: each with its rows of the whole team's batch, as of `sample_chains`.
        x: this rank's rows of it; `y` may have several labels for each, one after another.
    """
    labels, rows = len(y) // len(x), len(x) * team.data_ranks
    mine, loss, evaluations = team.rows(rows), torch.zeros((), device=x.device), 0
    for path, of_path in chains:
        evaluations += len(path) * (of_path.stop - of_path.start) * labels
        first, last = (min(max(row, mine.start), mine.stop) - mine.start for row in (of_path.start, of_path.stop))
        if first < last:
            part = _chain_loss(family, path, x[first:last], y[first * labels : last * labels]) * ((last - first) / len(x))
            _backward(part)
            loss += part.detach()
    return Step(loss, evaluations / team.data_ranks)


def _chain_loss(family: Family, path: Path, x: Tensor, y: Tensor) -> Tensor:
    *shallower, deepest = _exits(family, path, x)
    loss = F.cross_entropy(deepest, y)
    teacher = deepest.detach().log_softmax(dim=-1)
    for logits in shallower:
        distance = F.kl_div(logits.log_softmax(dim=-1), teacher, reduction="batchmean", log_target=True)
        loss = loss + 0.5 * F.cross_entropy(logits, y) + 0.5 * distance
    return loss


def ladder_step(family: Family, x: Tensor, y: Tensor) -> Step:
    """Backpropagation through the ladder with a cross-entropy at every rung: the usual early-exit network.

    Deep supervision with equal weights.
    """
    ladder = family.tree.ladder[-1]
    loss = torch.stack([F.cross_entropy(logits, y) for logits in _exits(family, ladder, x)]).sum()
    _backward(loss)
    return Step(loss.detach(), len(ladder) * len(y))


def _exits(family: Family, path: Path, x: Tensor) -> list[Tensor]:
    """Logits `(batch, classes)` at every node of `path` from which the head is one hop away; the last is the path's own."""
    tree, state = family.tree, family.embed(x)
    exits: list[Tensor] = []
    for node in path:
        state = family.blocks.at(node, state)
        if tree.is_hop(node, tree.n):
            exits.append(family.head_at(node)(state))
    return exits


def path_step(family: Family, path: Path, x: Tensor, y: Tensor) -> Step:
    """Ordinary backpropagation through one path, with the loss of its last state alone."""
    loss = F.cross_entropy(family(x, path), y)
    _backward(loss)
    return Step(loss.detach(), len(path) * len(y))


def _backward(loss: Tensor) -> None:
    """Backpropagate, unless the user has frozen all that the loss reaches."""
    if loss.requires_grad:
        loss.backward()


def contrastive_step(family: Family, path: Path, x: Tensor, y: Tensor) -> Step:
    """Contrastive forward-forward on the blocks of one path (Aghagolzadeh and Ezoji 2025, arXiv 2502.00571).

    Every layer (the first one with the embedding) gets the layer before it with gradients stopped, and its own loss on its
    own output, averaged over tokens: `contrastive_loss`, with a margin that falls linearly from the first layer to the
    last. The head learns the label from the last layer's output, with gradients stopped.

    From the authors' text and published code: the loss, its temperature and margins, the two differently augmented views
    of each image (here rows of `x` that share a label, so the caller gives both), the mean over tokens. Guessed, or
    changed to fit one loop: the head learns along with the layers, not in a second stage after them; one optimizer and one
    learning rate for all layers and the head; our augmentation, batch size and schedule.
    """
    state = family.embed(x)
    total = x.new_zeros(())
    for layer, node in enumerate(path):
        state = family.blocks.at(node, state)
        features = state.mean(dim=1) if state.ndim == 3 else state.flatten(1)
        first, last = CONTRAST_MARGINS
        loss = contrastive_loss(features, y, first + (last - first) * layer / max(1, len(path) - 1))
        _backward(loss)
        total += loss.detach()
        state = state.detach()
    loss = F.cross_entropy(family.head_at(path[-1])(state), y)
    _backward(loss)
    return Step(total + loss.detach(), len(path) * len(y))


def contrastive_loss(features: Tensor, y: Tensor, margin: float) -> Tensor:
    """The marginal supervised contrastive loss of features `(rows, width)` with labels `(rows,) int64`: a scalar.

    With cosine similarities `s_ij`, `t_ij = min(s_ij + margin, 1)` where i and j share a label and `s_ij` elsewhere, it is
    the mean over rows i, and over the other rows p of i's label, of `-log(exp(t_ip / T) / sum_{j != i} exp(t_ij / T))`. A
    row whose label no other row has counts 0.
    """
    directions = F.normalize(features, dim=1)
    similarity = directions @ directions.T
    same = y[:, None] == y
    similarity = torch.where(same, (similarity + margin).clamp(max=1), similarity) / CONTRAST_TEMPERATURE
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    log_p = similarity.masked_fill(itself, -torch.inf).log_softmax(dim=1)
    positive = same & ~itself
    of_row = log_p.masked_fill(~positive, 0).sum(dim=1) / positive.sum(dim=1).clamp(min=1)
    return -of_row.mean()


def hbll_evaluations(tree: Tree) -> int:
    """What a row costs an HBLL step: every block once, and once more as a right parent but for the D nodes whose right
    parent is the head."""
    return 2 * len(tree.nodes) - tree.hierarchy_depth


def chain_evaluations(tree: Tree) -> float:
    """What a row costs a sampled chain on average: the mean of D (the ladder) and N/2 (a uniform depth)."""
    return (tree.hierarchy_depth + tree.n / 2) / 2


def hbll_probability(tree: Tree, share: float) -> float:
    """How often to take an HBLL step, so that these take `share` (0..1) of all block evaluations on average."""
    hbll, chain = hbll_evaluations(tree), chain_evaluations(tree)
    return share * chain / (share * chain + (1 - share) * hbll)


def sample_chain(tree: Tree, rng: np.random.Generator) -> Path:
    """The ladder with probability 1/2, else a path as of `sample_path`."""
    return tree.ladder[-1] if rng.random() < 0.5 else sample_path(tree, rng)


def sample_chains(tree: Tree, rng: np.random.Generator, count: int, rows: int) -> list[tuple[Path, slice]]:
    """`count` chains for a batch, and the rows of it that take each.

    One is that of `sample_chain`. Of several the ladder has half of the rows, and paths as of `sample_path` share the rest
    equally: for each row that is the same on average, and a step's gradient varies less.
    """
    if count == 1:
        return [(sample_chain(tree, rng), slice(0, rows))]
    first = rows // 2
    edges = [first + (rows - first) * place // (count - 1) for place in range(count)]
    sampled = [(sample_path(tree, rng), slice(*edge)) for edge in itertools.pairwise(edges)]
    return [(tree.ladder[-1], slice(0, first)), *sampled]


def sample_path(tree: Tree, rng: np.random.Generator) -> Path:
    """A depth uniform in 1..N-1 and a uniform path of that depth."""
    counts = tree.count_paths_by_depth()
    depth = int(rng.integers(1, tree.n))
    return tree.path_at(depth, int(rng.integers(counts[depth])))
