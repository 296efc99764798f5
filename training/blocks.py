"""The blocks of a family: any modules, one for each node, or the fast way, all `N-1` of them in stacked tensors.

Stacked, every parameter has a leading axis of size `N-1`; index `n-1` belongs to node `n`. The nodes of a level and their
right parents are arithmetic progressions (see `family.tree`), so any set of blocks that training runs together is a
strided *view* of the stack and costs no copy.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = dict[str, Tensor]
"""Parameter name -> tensor: of one block, or of `k` blocks with a leading axis `k`."""


class Blocks(nn.Module, ABC):
    """`count` blocks; node `n` owns the n-th."""

    count: int

    @abstractmethod
    def at(self, node: int, state: Tensor) -> Tensor:
        """`f_node(state)`, `(batch, *state_shape)` -> the same shape."""

    @abstractmethod
    def at_each(self, nodes: range, states: Tensor) -> Tensor:
        """The blocks of `k` nodes on a batch of states each, `(k, batch, *state_shape)` -> the same shape."""

    @abstractmethod
    def module(self, node: int) -> nn.Module:
        """The block of a node as a module of its own: what is exported and counted."""


class SeparateBlocks(Blocks):
    """Any modules, one for each node: run one by one, so a level costs as many calls as it has nodes."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.count = len(modules)
        self.nodes = nn.ModuleDict({str(node): module for node, module in enumerate(modules, start=1)})

    def at(self, node: int, state: Tensor) -> Tensor:
        result: Tensor = self.nodes[str(node)](state)
        return result

    def at_each(self, nodes: range, states: Tensor) -> Tensor:
        return torch.stack([self.at(node, state) for node, state in zip(nodes, states, strict=True)])

    def module(self, node: int) -> nn.Module:
        return self.nodes[str(node)]


class StackedBlocks(Blocks):
    """Blocks of one architecture whose states all have the shape `state_shape`; a level is one batched call."""

    def __init__(self, count: int, state_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.count = count
        self.state_shape = state_shape

    def of(self, nodes: int | range) -> Weights:
        """The weights of one node's block, or of the blocks of several nodes with a leading axis, as views.

        With gradients enabled the views are detached leaves, and what a backward pass finds for them is added into
        the stack's `.grad` at once. Slicing inside the graph would instead build a zero-filled gradient of the whole
        stack for every slice.
        """
        index = nodes - 1 if isinstance(nodes, int) else slice(nodes.start - 1, nodes.stop - 1, nodes.step)
        weights: Weights = {}
        for name, parameter in self.named_parameters():
            view = parameter.detach()[index]
            if torch.is_grad_enabled():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                view.requires_grad_().register_post_accumulate_grad_hook(_adder(parameter.grad[index]))
            weights[name] = view
        return weights

    @abstractmethod
    def run(self, weights: Weights, states: Tensor) -> Tensor:
        """Apply one block to a batch of states, or `k` blocks to a batch of states each.

        `states` is `(batch, *state_shape)` for the weights of one block, `(k, batch, *state_shape)` for those of
        `k` blocks; the result has the same shape.
        """

    def at(self, node: int, state: Tensor) -> Tensor:
        return self.run(self.of(node), state)

    def at_each(self, nodes: range, states: Tensor) -> Tensor:
        return self.run(self.of(nodes), states)

    def module(self, node: int) -> nn.Module:
        return _OneOfStack(self, node)


class _OneOfStack(nn.Module):
    """One block of a stack, with a copy of its weights."""

    def __init__(self, blocks: StackedBlocks, node: int) -> None:
        super().__init__()
        self._run = blocks.run
        with torch.no_grad():
            for name, weight in blocks.of(node).items():
                self.register_parameter(name, nn.Parameter(weight.clone()))

    def forward(self, state: Tensor) -> Tensor:
        return self._run(dict(self.named_parameters()), state)


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    def add(leaf: Tensor) -> None:
        assert leaf.grad is not None
        total.add_(leaf.grad)
        leaf.grad = None

    return add


class Init(Protocol):
    """Draws an initial tensor of a shape, scaled for `fan_in` inputs."""

    def __call__(self, *shape: int, fan_in: int) -> Tensor: ...


def uniform_init(generator: torch.Generator) -> Init:
    """`U(-1/sqrt(fan_in), 1/sqrt(fan_in))`: what `torch.nn.Linear` draws for both weight and bias."""

    def draw(*shape: int, fan_in: int) -> Tensor:
        bound = 1 / math.sqrt(fan_in)
        return (torch.rand(*shape, generator=generator) * 2 - 1) * bound

    return draw


def linear(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`states @ weight + bias` over the last axis, with `weight` `(in, out)` or, stacked, `(k, in, out)`."""
    *outer, fan_in = states.shape
    if weight.ndim == 2:
        return torch.addmm(bias, states.reshape(-1, fan_in), weight).reshape(*outer, -1)
    return torch.baddbmm(bias.unsqueeze(1), states.reshape(outer[0], -1, fan_in), weight).reshape(*outer, -1)


class SigmoidBlocks(StackedBlocks):
    """`f(z) = sigmoid(z W + b)`, without residual or normalisation: the paper's MNIST network (sec. 4.1, Table 1)."""

    def __init__(self, count: int, width: int, init: Init) -> None:
        super().__init__(count, (width,))
        self.weight = nn.Parameter(init(count, width, width, fan_in=width))
        self.bias = nn.Parameter(init(count, width, fan_in=width))

    def run(self, weights: Weights, states: Tensor) -> Tensor:
        return torch.sigmoid(linear(states, weights["weight"], weights["bias"]))


class ResidualBlocks(StackedBlocks):
    """Pre-norm residual blocks of one hidden layer: `f(z) = z + gelu(LN(z) W1 + b1) W2 + b2`."""

    def __init__(self, count: int, width: int, hidden: int, init: Init) -> None:
        super().__init__(count, (width,))
        self.norm_scale = nn.Parameter(torch.ones(count, width))
        self.norm_shift = nn.Parameter(torch.zeros(count, width))
        self.up_weight = nn.Parameter(init(count, width, hidden, fan_in=width))
        self.up_bias = nn.Parameter(torch.zeros(count, hidden))
        self.down_weight = nn.Parameter(init(count, hidden, width, fan_in=hidden))
        self.down_bias = nn.Parameter(torch.zeros(count, width))

    def run(self, weights: Weights, states: Tensor) -> Tensor:
        normed = _layer_norm(states, weights["norm_scale"], weights["norm_shift"])
        inner = F.gelu(linear(normed, weights["up_weight"], weights["up_bias"]))
        return states + linear(inner, weights["down_weight"], weights["down_bias"])


class TransformerBlocks(StackedBlocks):
    """Pre-norm transformer blocks: `z + attention(LN(z))`, then `z + MLP(LN(z))` with a GELU."""

    def __init__(self, count: int, tokens: int, width: int, heads: int, hidden: int, init: Init) -> None:
        super().__init__(count, (tokens, width))
        self.heads = heads
        self.norm1_scale = nn.Parameter(torch.ones(count, width))
        self.norm1_shift = nn.Parameter(torch.zeros(count, width))
        self.qkv_weight = nn.Parameter(init(count, width, 3 * width, fan_in=width))
        self.qkv_bias = nn.Parameter(torch.zeros(count, 3 * width))
        self.project_weight = nn.Parameter(init(count, width, width, fan_in=width))
        self.project_bias = nn.Parameter(torch.zeros(count, width))
        self.norm2_scale = nn.Parameter(torch.ones(count, width))
        self.norm2_shift = nn.Parameter(torch.zeros(count, width))
        self.up_weight = nn.Parameter(init(count, width, hidden, fan_in=width))
        self.up_bias = nn.Parameter(torch.zeros(count, hidden))
        self.down_weight = nn.Parameter(init(count, hidden, width, fan_in=hidden))
        self.down_bias = nn.Parameter(torch.zeros(count, width))

    def run(self, weights: Weights, states: Tensor) -> Tensor:
        normed = _layer_norm(states, weights["norm1_scale"], weights["norm1_shift"])
        qkv = linear(normed, weights["qkv_weight"], weights["qkv_bias"])
        # (..., tokens, 3, heads, features) -> three times (..., heads, tokens, features)
        q, k, v = (part.transpose(-2, -3) for part in qkv.unflatten(-1, (3, self.heads, -1)).unbind(-3))
        mixed = self.attend(q, k, v).transpose(-2, -3).flatten(-2)
        states = states + linear(mixed, weights["project_weight"], weights["project_bias"])
        normed = _layer_norm(states, weights["norm2_scale"], weights["norm2_shift"])
        inner = F.gelu(linear(normed, weights["up_weight"], weights["up_bias"]))
        return states + linear(inner, weights["down_weight"], weights["down_bias"])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every token's mean of the values of all, `(..., heads, tokens, features)` each and the result."""
        # Written out: as fast here as torch's fused call, and it exports to two MatMuls and a Softmax, without the
        # fifteen shape operators that the exporter puts around the fused one.
        return torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2), dim=-1) @ v


def _layer_norm(states: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    width = states.shape[-1:]
    if scale.ndim == 1:
        return F.layer_norm(states, width, scale, shift)
    over_rows = (len(scale), *(1,) * (states.ndim - 2), *width)  # one scale and shift per block of the stack
    return torch.addcmul(shift.reshape(over_rows), F.layer_norm(states, width), scale.reshape(over_rows))
