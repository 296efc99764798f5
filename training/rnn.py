"""HBLL for recurrent networks (arXiv 2606.21497, sec. 4.5 and 6.5.5; eqs. 12-15), and backpropagation through time.

The tree is over time: node n of `0..N` is the state after n time steps. One cell `f_k` for each level k folds the `2**k`
steps between a node and its left parent into one state, `h_n = f_k(h_left, x[left:n])`, so `h_n` depends on nothing that
comes after. The right parent enters only as a target. All nodes of a level are one batched call.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from family.tree import Tree
from training.blocks import linear, uniform_init

CellName = Literal["gru", "elman"]


class ElmanCell(nn.Module):
    """`h' = tanh(x W + h U + b)`: `(rows, width)` and `(rows, inputs)` -> `(rows, width)`."""

    gates = 1

    def __init__(self, inputs: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        init = uniform_init(generator)
        self.input_weight = nn.Parameter(init(inputs, self.gates * width, fan_in=width))
        self.input_bias = nn.Parameter(init(self.gates * width, fan_in=width))
        self.state_weight = nn.Parameter(init(width, self.gates * width, fan_in=width))
        self.state_bias = nn.Parameter(init(self.gates * width, fan_in=width))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """The next state."""
        return torch.tanh(linear(x, self.input_weight, self.input_bias) + linear(h, self.state_weight, self.state_bias))


class GruCell(ElmanCell):
    """`torch.nn.GRU`'s cell, written out: `h' = (1 - z) n + z h`, with n's share of the state behind the reset gate."""

    gates = 3

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """The next state."""
        xr, xz, xn = linear(x, self.input_weight, self.input_bias).chunk(3, dim=-1)
        hr, hz, hn = linear(h, self.state_weight, self.state_bias).chunk(3, dim=-1)
        reset, update = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        new = torch.tanh(xn + reset * hn)
        return new + update * (h - new)


CELLS: dict[CellName, type[ElmanCell]] = {"gru": GruCell, "elman": ElmanCell}


class ChainRnn(nn.Module):
    """An ordinary recurrent network for sequences: one cell rolled from a state of zeros, and a head on the last state.

    Args:
        cell: the kind of the cell, and of all cells of `TreeRnn`.
        inputs: features of a time step.
        width: features of a state.
    """

    def __init__(self, cell: CellName, inputs: int, width: int, classes: int, seed: int, levels: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.width = width
        self.cells = nn.ModuleList(CELLS[cell](inputs << level, width, generator) for level in range(levels))
        self.head_weight = nn.Parameter(uniform_init(generator)(width, classes, fan_in=width))
        self.head_bias = nn.Parameter(torch.zeros(classes))

    def head(self, h: Tensor) -> Tensor:
        """State -> logits `(rows, classes)`."""
        return linear(h, self.head_weight, self.head_bias)

    def blocks(self, x: Tensor, level: int) -> Tensor:
        """`(rows, N, inputs)` -> `(N / 2**level, rows, 2**level * inputs)`: what the cell of a level reads, in order."""
        blocks: Tensor = x.unflatten(1, (-1, 1 << level)).flatten(2)
        return blocks.transpose(0, 1)

    def roll(self, x: Tensor, level: int = 0) -> Tensor:
        """Logits of the cell of one level rolled over all of x `(rows, N, inputs)`; level 0 is the deployed model."""
        logits: Tensor = self.head(roll(self.cells[level], self.start(x), self.blocks(x, level)))
        return logits

    def start(self, x: Tensor) -> Tensor:
        """The state of node 0, `(rows, width)`."""
        return x.new_zeros(len(x), self.width)


class TreeRnn(ChainRnn):
    """A cell for each level of a tree over `tree.n` time steps: that of level k reads `2**k * inputs` features at once.

    With equal seeds its cell of level 0 begins as that of a `ChainRnn`.
    """

    def __init__(self, tree: Tree, cell: CellName, inputs: int, width: int, classes: int, seed: int) -> None:
        super().__init__(cell, inputs, width, classes, seed, levels=tree.hierarchy_depth)
        self.tree = tree

    def climb(self, x: Tensor) -> list[Tensor]:
        """The tree readout: logits `(rows, classes)` of every rung of the ladder, coarsest first.

        Rung r visits N/2, 3N/4, ... of r nodes, each by the cell of its level, and then hops to N by the last of them.
        """
        h, n, rungs = self.start(x), 0, []
        for level in reversed(range(self.tree.hierarchy_depth)):
            blocks = self.blocks(x, level)
            h = self.cells[level](h, blocks[n >> level])
            n += 1 << level
            rungs.append(self.head(self.cells[level](h, blocks[n >> level])))
        return rungs


def roll(cell: nn.Module, h: Tensor, blocks: Tensor) -> Tensor:
    """The state after a chain of steps from h; `blocks` is `(steps, rows, features)`."""
    for block in blocks:
        h = cell(h, block)
    return h


def tree_step(model: TreeRnn, x: Tensor, y: Tensor, *, sweeps: int = 0, weight: float = 1.0) -> Tensor:
    """One batch of local learning, forward and backward, level by level from the root; returns the loss, detached.

    A node's loss is `CE(head(b), y)` if its right parent is N, else `1/2 ||b - stop_grad(h_right)||^2`, with
    `b = f_k(a, x[n:right])` and `a = f_k(stop_grad(h_left), x[left:n])`: summed over features and nodes, a mean over rows.
    It reaches the cell of its level and, if the right parent is N, the head, and nothing else.

    A level has one node that learns the label and up to `N/2 - 1` that learn states, each in all its features: with weight
    1, as published, the label's share of a fine level's loss is small.

    Args:
        x: `(rows, N, inputs) float32`.
        y: labels `(rows,) int64`.
        sweeps: K of the consistency loss (`consistency_loss`), 0 for none.
        weight: of the losses whose target is a state, the consistency loss among them.
    """
    n, rows = model.tree.n, len(y)
    states = x.new_zeros(n, rows, model.width)  # h_0 .. h_{N-1}, detached
    total = x.new_zeros(())
    for level in reversed(range(model.tree.hierarchy_depth)):
        span, cell, blocks = 1 << level, model.cells[level], model.blocks(x, level)
        a = cell(states[:: 2 * span], blocks[0::2])
        b = cell(a, blocks[1::2])
        loss = F.cross_entropy(model.head(b[-1]), y)
        if len(b) > 1:
            loss = loss + weight * 0.5 * F.mse_loss(b[:-1], states[2 * span :: 2 * span], reduction="sum") / rows
        loss.backward()
        total += loss.detach()
        states[span :: 2 * span] = a.detach()
    if sweeps:
        loss = weight * consistency_loss(model, x, states, sweeps)
        loss.backward()
        total += loss.detach()
    return total


def consistency_loss(model: TreeRnn, x: Tensor, states: Tensor, sweeps: int) -> Tensor:
    """What teaches the deployed chain to live with its own states: `1/2 ||h~^(K) - h||^2`, a mean over rows.

    `states` are the tree's, `(N, rows, width)`, detached. Its gradient reaches the cell of level 0 alone.
    """
    chain = sweep(model, x, states, sweeps)
    return 0.5 * F.mse_loss(chain, states[1:], reduction="sum") / len(x)


def sweep(model: TreeRnn, x: Tensor, states: Tensor, sweeps: int) -> Tensor:
    """`h~_1 .. h~_{N-1}` after K parallel sweeps `h~_t <- f_0(h~_{t-1}, x_t)` from the tree's states (Jacobi iteration).

    All t of a sweep are one call, so K sweeps cost K calls; with K = N - 1 or more they equal the rolled chain. Only the
    last sweep carries a gradient. Returns `(N - 1, rows, width)`.
    """
    steps, chain = model.blocks(x, 0)[:-1], states
    for index in range(sweeps):
        with torch.set_grad_enabled(index == sweeps - 1):
            chain = torch.cat([states[:1], model.cells[0](chain[:-1], steps)])
    return chain[1:]


def bptt_step(model: ChainRnn | FusedGru, x: Tensor, y: Tensor) -> Tensor:
    """One batch of backpropagation through time; returns the loss, detached."""
    loss = F.cross_entropy(model.roll(x), y)
    loss.backward()
    return loss.detach()


class FusedGru(nn.Module):
    """`torch.nn.GRU` and a head: the baseline whose steps run inside one library call."""

    def __init__(self, inputs: int, width: int, classes: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.gru = nn.GRU(inputs, width, batch_first=True)
            self.head = nn.Linear(width, classes)

    def roll(self, x: Tensor) -> Tensor:
        """Logits `(rows, classes)` after all of x `(rows, N, inputs)`."""
        _, last = self.gru(x)
        logits: Tensor = self.head(last[0])
        return logits


def as_sequence(images: Tensor, steps: int, permutation: Tensor | None = None) -> Tensor:
    """Images `(rows, height, width)` as `(rows, steps, features)`: pixels in reading order or permuted, zeros at the end.

    The features of a step are as many pixels as needed, `ceil(height * width / steps)`.
    """
    pixels = images.flatten(1)
    if permutation is not None:
        pixels = pixels[:, permutation]
    features = -(-pixels.shape[1] // steps)
    return F.pad(pixels, (0, steps * features - pixels.shape[1])).reshape(-1, steps, features)
