"""What a run that diverged says: the layer, not only that something is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from training.config import ResMlpConfig
from training.diagnosis import diagnose
from training.model import Family, build_family


class Exploding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Linear(4, 4)
        self.log = Log()

    def forward(self, state: Tensor) -> Tensor:
        return self.log(self.fine(state))


class Log(nn.Module):
    def forward(self, state: Tensor) -> Tensor:
        return torch.log(state - state.max() - 1)


def own(*blocks: nn.Module, head: nn.Module | None = None) -> Family:
    torch.manual_seed(0)
    return Family(nn.Linear(3, 4), blocks, head or nn.Linear(4, 2))


X = torch.ones(5, 3)


def test_the_layer_of_the_node_is_named() -> None:
    family = own(nn.Linear(4, 4), nn.Linear(4, 4), Exploding())
    assert diagnose(family, X) == (
        "the block of node 3 gives what is not finite, after the blocks of 2, first its layer blocks.nodes.3.log"
    )
    assert family.training
    assert not any(module._forward_hooks for module in family.modules())


def test_the_embedding_the_head_and_the_input_are_told_apart() -> None:
    family = own(nn.Linear(4, 4))
    assert diagnose(Family(Log(), [nn.Linear(3, 3)], nn.Linear(3, 2)), X).startswith(
        "the embedding gives what is not finite"
    )
    assert diagnose(own(nn.Linear(4, 4), head=nn.Sequential(nn.Linear(4, 2), Log())), X) == (
        "the head gives what is not finite, after the blocks of 1, first its layer head.1"
    )
    assert diagnose(family, torch.where(torch.arange(5)[:, None] == 3, torch.inf, X)) == (
        "the input is not finite in row 3 of the batch"
    )
    assert diagnose(family, X).startswith("all layers are finite on this batch, so the loss itself overflowed")


@pytest.mark.parametrize("node", [1, 5])
def test_a_stacked_parameter_is_named_with_its_node(node: int) -> None:
    family = build_family(ResMlpConfig(width=4, hidden=4), seed=0)
    with torch.no_grad():
        family.blocks.get_parameter("up_bias")[node - 1, 2] = torch.nan
    assert diagnose(family, torch.ones(2, 28, 28)) == f"the parameter blocks.up_bias of node {node} is not finite any more"
