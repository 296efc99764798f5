"""Language models as families: minGPT's pre-norm blocks as the blocks of the tree.

A *row* is a position of a window: states are `(windows * context, width)`, labels `(windows * context,)` the next token of
every position. So all training methods count and average positions as they do examples, and need not know of text.
They must not nudge (c = 0): a nudged state carries its label's gradient, and children learn to read the label from it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from family.tree import Tree
from training.blocks import Init, TransformerBlocks, Weights, uniform_init
from training.model import Family, LinearHead


class GptConfig(BaseModel):
    """A family of GPT blocks on windows of `context` tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hierarchy_depth: int = Field(3, ge=1, le=4)
    context: int = Field(64, ge=1)
    width: int = Field(64, ge=1)
    heads: int = Field(4, ge=1)
    positions: bool = Field(False, description="learned positions, as in GPT-2; else ALiBi's slopes in every attention")

    @model_validator(mode="after")
    def _divides(self) -> GptConfig:
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, got width {self.width} and heads {self.heads}")
        return self


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
        states = F.embedding(windows, self.weight)
        if self.position is not None:
            states = states + self.position
        return states.flatten(0, 1)


def build_gpt(config: GptConfig, vocabulary: int, seed: int) -> Family:
    """A freshly initialised family that predicts the next of `vocabulary` tokens at every position."""
    init = uniform_init(torch.Generator().manual_seed(seed))
    embed = TokenEmbed(vocabulary, config, init)
    blocks = CausalBlocks(len(Tree(config.hierarchy_depth).nodes), config, init)
    return Family(embed, blocks, LinearHead(config.width, vocabulary, init, norm=True))
