"""The losses that train a family: one HBLL step, and one sampled chain with exits.

Each function runs one batch forward *and* backward, adds into the gradients of the family's parameters, and returns
the loss with the work done, in block evaluations (one block forward and backward on one row).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from family.tree import Path, Tree
from training.model import Family


@dataclass(frozen=True, slots=True)
class Step:
    """`loss`: the batch's scalar loss, detached. `evaluations`: block evaluations spent on it."""

    loss: Tensor
    evaluations: int


def hbll_step(family: Family, x: Tensor, y: Tensor, *, nudge: float, noise: float, generator: torch.Generator) -> Step:
    """One step of Hierarchical Block-Local Learning (arXiv 2606.21497, Algorithm 1; eqs. 10, 11, 29-31).

    Level by level from the root, all nodes of a level in one batched call. Node n reads its left parent's state,
    predicts its right parent's (node N: the label, through the head), and its loss reaches no other block than
    `f_n` and that right parent's. Children read `z_n = stop_grad(a_n - c * dloss_n/da_n + sigma/sqrt(2) * eps)`.

    Deviations from the paper, measured better in trials: the latent loss is a mean over features, not a sum; the
    embedding is trained by the root node's loss alone.

    Args:
        x: the family's input, `(batch, ...)`.
        y: labels `(batch,) int64`.
        nudge: c, on each example's own gradient.
        noise: sigma.
        generator: source of eps.
    """
    tree, batch = family.tree, len(y)
    embedded = family.embed(x)
    states = embedded.new_empty((tree.n, *embedded.shape))  # z_0 .. z_{N-1}, detached
    states[0] = embedded.detach()
    total = x.new_zeros(())
    evaluations = 0
    for level in reversed(range(tree.hierarchy_depth)):
        nodes = tree.level_nodes(level)
        span = 1 << level
        lefts = embedded.unsqueeze(0) if level == tree.hierarchy_depth - 1 else states[0 : tree.n : 2 * span]
        activations = family.blocks.run(family.blocks.of(nodes), lefts)
        # A detached leaf between f_n and its right parent: its gradient is both what f_n's backward pass needs and
        # the nudge of the posterior sample, so neither costs a pass of its own.
        leaf = activations.detach().requires_grad_()
        loss = F.cross_entropy(family.head(leaf[-1]), y)
        evaluations += len(nodes) * batch
        rights = range(2 * span, tree.n, 2 * span)  # right parents of all but the last node
        if rights:
            predictions = family.blocks.run(family.blocks.of(rights), leaf[:-1])
            targets = states[2 * span : tree.n : 2 * span]
            loss = loss + F.mse_loss(predictions, targets, reduction="none").flatten(2).mean(dim=(1, 2)).sum()
            evaluations += len(rights) * batch
        loss.backward()
        gradient = leaf.grad
        assert gradient is not None
        activations.backward(gradient)
        total += loss.detach()
        posterior = leaf.detach() - nudge * batch * gradient  # the loss is a batch mean: times batch is per example
        if noise:
            posterior = posterior + noise / 2**0.5 * torch.randn(posterior.shape, generator=generator)
        states[nodes.start : nodes.stop : nodes.step] = posterior
    return Step(total, evaluations)


def chain_step(family: Family, path: Path, x: Tensor, y: Tensor) -> Step:
    """Backpropagation through one path, with every exit that the path passes.

    A node from which the head can be reached in one hop is an exit: `0 -> ... -> n -> N` is a valid path too, whose
    answer costs nothing more. The deepest exit learns the label; each shallower one half the label and half the
    deepest exit's distribution (self-distillation, temperature 1). The loss is their plain sum.
    """
    tree = family.tree
    state = family.embed(x)
    exits: list[Tensor] = []
    for node in path:
        state = family.blocks.at(node, state)
        if tree.is_hop(node, tree.n):
            exits.append(family.head(state))
    *shallower, deepest = exits
    loss = F.cross_entropy(deepest, y)
    teacher = deepest.detach().log_softmax(dim=-1)
    for logits in shallower:
        distance = F.kl_div(logits.log_softmax(dim=-1), teacher, reduction="batchmean", log_target=True)
        loss = loss + 0.5 * F.cross_entropy(logits, y) + 0.5 * distance
    loss.backward()
    return Step(loss.detach(), len(path) * len(y))


def path_step(family: Family, path: Path, x: Tensor, y: Tensor) -> Step:
    """Ordinary backpropagation through one path: the baseline of a separate network."""
    loss = F.cross_entropy(family(x, path), y)
    loss.backward()
    return Step(loss.detach(), len(path) * len(y))


def hbll_probability(tree: Tree, share: float) -> float:
    """How often to take an HBLL step, so that these take `share` (0..1) of all block evaluations on average.

    A row costs an HBLL step `2(N-1) - D` evaluations: every block once, and once more as a right parent but for the
    D nodes whose right parent is the head. A chain costs the mean of D (the ladder) and N/2 (a uniform depth).
    """
    hbll = 2 * len(tree.nodes) - tree.hierarchy_depth
    chain = (tree.hierarchy_depth + tree.n / 2) / 2
    return share * chain / (share * chain + (1 - share) * hbll)


def sample_chain(tree: Tree, rng: np.random.Generator) -> Path:
    """The ladder with probability 1/2, else a depth uniform in 1..N-1 and a uniform path of that depth."""
    if rng.random() < 0.5:
        return tree.ladder[-1]
    counts = tree.count_paths_by_depth()
    depth = int(rng.integers(1, tree.n))
    return tree.path_at(depth, int(rng.integers(counts[depth])))
