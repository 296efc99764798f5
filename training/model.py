"""A family: one embedding, the blocks that form the tree's internal nodes, and the prediction head, one or one an exit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from family.tree import Path, Tree
from training.blocks import (
    Blocks,
    Init,
    ResidualBlocks,
    SeparateBlocks,
    SigmoidBlocks,
    StackedBlocks,
    TransformerBlocks,
    uniform_init,
)
from training.config import ConfigError, CustomConfig, GptConfig, MlpConfig, ModelConfig, ResMlpConfig, VitConfig
from training.dataset import DataSpec
from training.digits import DIGITS


class Family(nn.Module):
    """The shared weights of all fast paths of a tree.

    Args:
        embed: `x` -> the state of node 0, `(batch, *state_shape) float32`.
        blocks: the blocks of the nodes 1, 2, ... `2**D - 1`, which gives the tree its hierarchy depth D: any modules from
            a state to a state of the same shape, or stacked blocks, whose levels run as one batched call each.
        head: a state -> logits `(batch, classes) float32`, the prediction of node N. One for all paths, as published, or
            one for each of the D exits that they end at (`Tree.exits`, in that order).

    Attributes:
        shares_head: whether all paths have one head.

    Dropout may be anywhere. The last axis of a state is its features, the others before it are tokens.

    Raises:
        ValueError: there are not `2**D - 1` blocks, or several heads but not D, two parts share a parameter, or a part
            would be shared by states of several kinds and cannot be (batch normalisation).
    """

    def __init__(
        self, embed: nn.Module, blocks: StackedBlocks | Sequence[nn.Module], head: nn.Module | Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.embed = embed
        self.blocks: Blocks = blocks if isinstance(blocks, StackedBlocks) else SeparateBlocks(blocks)
        count = self.blocks.count
        if count < 1 or count & (count + 1):
            raise ValueError(f"a family has 2**D - 1 blocks (1, 3, 7, 15, ...), one for each node of its tree, got {count}")
        self.tree = Tree(count.bit_length())
        self.shares_head = isinstance(head, nn.Module) and not isinstance(head, nn.ModuleList)
        if self.shares_head:
            self.head = cast(nn.Module, head)
        elif len(heads := cast(Sequence[nn.Module], head)) == len(self.tree.exits):
            self.head = nn.ModuleDict({str(node): each for node, each in zip(self.tree.exits, heads, strict=True)})
        else:
            raise ValueError(f"a family of {count} blocks has one head or {len(self.tree.exits)}, got {len(heads)}")
        _require_own_parameters(self)
        _refuse_batch_statistics(self)

    def forward(self, x: Tensor, path: Path) -> Tensor:
        """Logits of one path: `x` -> embedding -> its blocks -> head."""
        state = self.embed(x)
        for node in path:
            state = self.blocks.at(node, state)
        logits: Tensor = self.head_at(path[-1])(state)
        return logits

    def head_at(self, node: int) -> nn.Module:
        """The head of paths that end at this exit."""
        return self.head if self.shares_head else self.head.get_submodule(str(node))


def _require_own_parameters(family: Family) -> None:
    """A shared parameter would carry the gradient of one node's loss into another's block."""
    owners: dict[int, str] = {}
    for name, parameter in family.named_parameters(remove_duplicate=False):
        if (owner := owners.setdefault(id(parameter), name)) != name:
            raise ValueError(f"{name} is the same parameter as {owner}: build every block as a module of its own")


def _refuse_batch_statistics(family: Family) -> None:
    for name, module in family.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not name.startswith("embed"):
            raise ValueError(
                f"{name} is a {type(module).__name__}: a node's block reads states of different nodes, whose statistics "
                "differ, so the running mean fits none of them. Use LayerNorm or GroupNorm (in the embedding it may stay)"
            )


class Standardise(nn.Module):
    """`(rows, *input_shape)` plain values -> the same shape, `(x - mean) / std` with the training data's mean and standard
    deviation: the first module of an embedding, so that clients send plain values."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        mean, std = spec.constants()
        self.register_buffer("mean", mean, persistent=False)  # the run's folder keeps them, with the rest of the spec
        self.register_buffer("std", std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class PatchEmbed(nn.Module):
    """Square images of 1 or 3 channels -> `(batch, tokens, width)`: linear patches plus learned positions."""

    def __init__(self, spec: DataSpec, patch: int, width: int, init: Init, generator: torch.Generator) -> None:
        super().__init__()
        *channels, height, side = spec.input_shape if len(spec.input_shape) > 1 else (1, *spec.input_shape)
        if height != side or len(channels) > 1 or (channels and channels[0] not in (1, 3)):
            raise ConfigError(
                f"model.kind vit takes square images of 1 or 3 channels, got rows of {list(spec.input_shape)}"
            )
        if side % patch:
            raise ConfigError(f"model.patch must divide the image side {side}, got {patch}")
        self.channels, self.grid, self.patch = (channels or [1])[0], side // patch, patch
        self.normalise = Standardise(spec)
        features = self.channels * patch * patch
        self.weight = nn.Parameter(init(width, features, fan_in=features))
        self.bias = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(torch.randn(self.tokens, width, generator=generator) * 0.02)

    @property
    def tokens(self) -> int:
        return self.grid * self.grid

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalise(x).reshape(-1, self.channels, self.grid, self.patch, self.grid, self.patch)
        patches = x.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.tokens, self.channels * self.patch * self.patch)
        return F.linear(patches, self.weight, self.bias) + self.position


class FlatEmbed(nn.Module):
    """`(batch, *input_shape)` -> `(batch, width)`: one linear layer on all values."""

    def __init__(self, spec: DataSpec, width: int, init: Init) -> None:
        super().__init__()
        self.normalise = Standardise(spec)
        features = math.prod(spec.input_shape)
        self.weight = nn.Parameter(init(width, features, fan_in=features))
        self.bias = nn.Parameter(init(width, fan_in=features))

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


Factory = Callable[[DataSpec], Family]
"""Builds a family of the user's own modules for data; seeded by its caller."""


def build_family(config: ModelConfig, seed: int, spec: DataSpec = DIGITS, factory: Factory | None = None) -> Family:
    """A freshly initialised family on the CPU; equal configurations, data and seeds give equal weights.

    `factory` builds the families of `model.kind = "custom"`, which no configuration describes.

    Raises:
        ConfigError: the model does not fit the data, or is custom and there is no factory.
    """
    if isinstance(config, CustomConfig):
        return _build_custom(config, seed, spec, factory)
    if factory is not None:
        raise ConfigError(f'a factory goes with model.kind = "custom", and this model is a {config.kind}')
    if isinstance(config, GptConfig):
        from training.language import build_windows

        return build_windows(config, spec, seed)
    generator = torch.Generator().manual_seed(seed)
    init = uniform_init(generator)
    count = len(Tree(config.hierarchy_depth).nodes)
    classes = len(spec.labels)
    blocks: StackedBlocks
    match config:
        case VitConfig():
            patches = PatchEmbed(spec, config.patch, config.width, init, generator)
            blocks = TransformerBlocks(count, patches.tokens, config.width, config.heads, config.hidden, init)
            head = LinearHead(config.width, classes, init, norm=True, pool=True)
            if not config.exit_heads:
                return Family(patches, blocks, head)
            heads = [copy.deepcopy(head) for _ in range(config.hierarchy_depth)]  # which begin as one
            return Family(patches, blocks, heads)
        case ResMlpConfig():
            blocks, norm = ResidualBlocks(count, config.width, config.hidden, init), True
        case MlpConfig():
            blocks, norm = SigmoidBlocks(count, config.width, init), False
    flat = FlatEmbed(spec, config.width, init)
    return Family(flat, blocks, LinearHead(config.width, classes, init, norm=norm))


def _build_custom(config: CustomConfig, seed: int, spec: DataSpec, factory: Factory | None) -> Family:
    if factory is None:
        named = f" by {config.factory}" if config.factory else ", and its configuration does not say how"
        raise ConfigError(
            f"this model was built in Python{named}. Building it runs that code, so name it: --factory "
            f"{config.factory or 'MODULE:FUNCTION'}; or go on in Python, with training.custom.load_trained"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        family = factory(spec)
    if family.tree.hierarchy_depth != config.hierarchy_depth:
        raise ConfigError(
            f"model.hierarchy_depth is {config.hierarchy_depth}, and the factory gives a family of "
            f"{family.tree.hierarchy_depth}, {len(family.tree.nodes)} blocks"
        )
    return family
