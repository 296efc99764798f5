"""Language models as families: minGPT's pre-norm blocks as the blocks of the tree.

A *row* is a position of a window: states are `(windows * context, width)`, labels `(windows * context,)` the next token of
every position. So all training methods count and average positions as they do examples, and need not know of text.
They must not nudge (c = 0): a nudged state carries its label's gradient, and children learn to read the label from it.

What is served is the same family with whole windows as rows, which predicts the token after each (`build_windows`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from family.tree import Tree
from training.blocks import Init, TransformerBlocks, Weights, uniform_init
from training.config import ConfigError, GptConfig
from training.dataset import DataSpec
from training.model import Family, LinearHead


class CausalBlocks(TransformerBlocks):
    """Transformer blocks in which a position sees itself and those before it; states are `(windows * context, width)`.

    Without learned positions, ALiBi (Press et al. 2022, arXiv 2108.12409): head h of H adds `-2**(-8 h / H)` for each
    position of distance.
    """

    bias: Tensor

    def __init__(self, count: int, config: GptConfig, init: Init) -> None:
        super().__init__(count, config.context, config.width, config.heads, 4 * config.width, init)
        self.context, self.state_shape = config.context, (config.width,)
        steps = torch.arange(config.context)
        distance = (steps[:, None] - steps).float()
        slopes = 2.0 ** (-8 * torch.arange(1, config.heads + 1) / config.heads)
        bias = -slopes[:, None, None] * distance if not config.positions else torch.zeros(1, *distance.shape)
        self.register_buffer("bias", bias.masked_fill(distance < 0, -torch.inf), persistent=False)

    def run(self, weights: Weights, states: Tensor) -> Tensor:
        """As every stack's: `(rows, width)`, or `(k, rows, width)` for `k` blocks."""
        windows = states.unflatten(-2, (-1, self.context))
        return super().run(weights, windows).flatten(-3, -2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.to(q.dtype))


class TokenEmbed(nn.Module):
    """Windows `(windows, context) int64` -> a state for each position, `(windows * context, width)`."""

    def __init__(self, vocabulary: int, config: GptConfig, init: Init) -> None:
        super().__init__()
        self.weight = nn.Parameter(init(vocabulary, config.width, fan_in=config.width))
        self.position = nn.Parameter(init(config.context, config.width, fan_in=config.width)) if config.positions else None

    def forward(self, windows: Tensor) -> Tensor:
        """The states of node 0."""
        return self.by_window(windows).flatten(0, 1)

    def by_window(self, windows: Tensor) -> Tensor:
        """The same as `(windows, context, width)`."""
        states = F.embedding(windows, self.weight)
        return states if self.position is None else states + self.position


def build_gpt(config: GptConfig, vocabulary: int, seed: int) -> Family:
    """A freshly initialised family that predicts the next of `vocabulary` tokens at every position."""
    init = uniform_init(torch.Generator().manual_seed(seed))
    embed = TokenEmbed(vocabulary, config, init)
    blocks = CausalBlocks(len(Tree(config.hierarchy_depth).nodes), config, init)
    return Family(embed, blocks, LinearHead(config.width, vocabulary, init, norm=True))


class _WindowEmbed(TokenEmbed):
    def forward(self, windows: Tensor) -> Tensor:
        return self.by_window(windows)


class _WindowBlocks(CausalBlocks):
    """States are `(windows, context, width)`."""

    def __init__(self, count: int, config: GptConfig, init: Init) -> None:
        super().__init__(count, config, init)
        self.state_shape = (config.context, config.width)

    def run(self, weights: Weights, states: Tensor) -> Tensor:
        return TransformerBlocks.run(self, weights, states)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Written out: the exporter puts a dozen shape operators around the fused call.
        return torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2) + self.bias, dim=-1) @ v


class _LastHead(LinearHead):
    def forward(self, state: Tensor) -> Tensor:
        return super().forward(state[:, -1])


def build_windows(config: GptConfig, spec: DataSpec, seed: int) -> Family:
    """The family of `build_gpt`, its parameters under the same names, with windows as rows: `(windows, context) int64` ->
    logits of the token after each window, `(windows, vocabulary)`. This is what is evaluated, exported and served.

    Raises:
        ConfigError: rows are no windows of `config.context` tokens.
    """
    if spec.vocabulary is None or spec.input_shape != (config.context,):
        raise ConfigError(
            f'model.kind gpt takes windows of {config.context} tokens (data.kind = "text", data.context = '
            f"{config.context}), got rows of {list(spec.input_shape)} of {spec.description}"
        )
    init = uniform_init(torch.Generator().manual_seed(seed))
    embed = _WindowEmbed(spec.vocabulary, config, init)
    blocks = _WindowBlocks(len(Tree(config.hierarchy_depth).nodes), config, init)
    return Family(embed, blocks, _LastHead(config.width, spec.vocabulary, init, norm=True))
