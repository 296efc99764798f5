"""A family: one embedding, stacked blocks that form the tree's internal nodes, and one shared prediction head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from family.tree import Path, Tree
from training.blocks import Init, ResidualBlocks, SigmoidBlocks, StackedBlocks, TransformerBlocks, uniform_init
from training.config import IMAGE_SIDE, MlpConfig, ModelConfig, ResMlpConfig, VitConfig

CLASSES = 10
PIXEL_MEAN, PIXEL_STD = 0.1307, 0.3081
"""Of MNIST's pixels scaled to 0..1; the normalisation is part of the embedding, so clients send plain pixels."""


class Family(nn.Module):
    """The shared weights of all fast paths of a tree.

    Args:
        tree: the tree; it has as many internal nodes as `blocks` has blocks.
        embed: `x` -> the state of node 0, `(batch, *state_shape) float32`.
        blocks: the block of every internal node.
        head: a state -> logits `(batch, classes) float32`; the prediction of node N.
    """

    def __init__(self, tree: Tree, embed: nn.Module, blocks: StackedBlocks, head: nn.Module) -> None:
        super().__init__()
        if blocks.count != len(tree.nodes):
            raise ValueError(
                f"a tree of hierarchy depth {tree.hierarchy_depth} has {len(tree.nodes)} blocks, got {blocks.count}"
            )
        self.tree = tree
        self.embed = embed
        self.blocks = blocks
        self.head = head

    def forward(self, x: Tensor, path: Path) -> Tensor:
        """Logits of one path: `x` -> embedding -> its blocks -> head."""
        state = self.embed(x)
        for node in path:
            state = self.blocks.at(node, state)
        logits: Tensor = self.head(state)
        return logits


class _Normalise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - PIXEL_MEAN) / PIXEL_STD


class PatchEmbed(nn.Module):
    """`(batch, side, side)` pixels 0..1 -> `(batch, tokens, width)`: linear patches plus learned positions."""

    def __init__(self, side: int, patch: int, width: int, init: Init, generator: torch.Generator) -> None:
        super().__init__()
        self.grid, self.patch = side // patch, patch
        self.normalise = _Normalise()
        self.weight = nn.Parameter(init(width, patch * patch, fan_in=patch * patch))
        self.bias = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(torch.randn(self.tokens, width, generator=generator) * 0.02)

    @property
    def tokens(self) -> int:
        return self.grid * self.grid

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalise(x).reshape(-1, self.grid, self.patch, self.grid, self.patch)
        patches = x.transpose(2, 3).reshape(-1, self.tokens, self.patch * self.patch)
        return F.linear(patches, self.weight, self.bias) + self.position


class FlatEmbed(nn.Module):
    """`(batch, side, side)` pixels 0..1 -> `(batch, width)`: one linear layer."""

    def __init__(self, side: int, width: int, init: Init) -> None:
        super().__init__()
        self.normalise = _Normalise()
        self.weight = nn.Parameter(init(width, side * side, fan_in=side * side))
        self.bias = nn.Parameter(init(width, fan_in=side * side))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.normalise(x).flatten(1), self.weight, self.bias)


class LinearHead(nn.Module):
    """State -> logits. With `norm` the state is normalised first; with `pool`, then averaged over its tokens."""

    def __init__(self, width: int, classes: int, init: Init, *, norm: bool = False, pool: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else None
        self.pool = pool
        self.weight = nn.Parameter(init(classes, width, fan_in=width))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, state: Tensor) -> Tensor:
        if self.norm is not None:
            state = self.norm(state)
        if self.pool:
            state = state.mean(dim=-2)
        return F.linear(state, self.weight, self.bias)


def build_family(config: ModelConfig, seed: int) -> Family:
    """A freshly initialised family on the CPU; equal configurations and seeds give equal weights."""
    generator = torch.Generator().manual_seed(seed)
    init = uniform_init(generator)
    tree = Tree(config.hierarchy_depth)
    count = len(tree.nodes)
    blocks: StackedBlocks
    match config:
        case VitConfig():
            patches = PatchEmbed(IMAGE_SIDE, config.patch, config.width, init, generator)
            blocks = TransformerBlocks(count, patches.tokens, config.width, config.heads, config.hidden, init)
            return Family(tree, patches, blocks, LinearHead(config.width, CLASSES, init, norm=True, pool=True))
        case ResMlpConfig():
            blocks, norm = ResidualBlocks(count, config.width, config.hidden, init), True
        case MlpConfig():
            blocks, norm = SigmoidBlocks(count, config.width, init), False
    flat = FlatEmbed(IMAGE_SIDE, config.width, init)
    return Family(tree, flat, blocks, LinearHead(config.width, CLASSES, init, norm=norm))
