"""What a row costs in each part of a family: FLOPs, as torch's own counter has them, and parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from family.tree import Cost
from training.model import Family


def costs(family: Family, example: Tensor) -> tuple[Cost, Cost]:
    """FLOPs of one row (matrix products and convolutions, a multiply-add counts two) and parameters, by part.

    `example` is one row, `(1, *input_shape)`, where the family's weights are.
    """
    with torch.no_grad(), without_fused_kernels():
        state = family.embed(example)
        flops = Cost(
            _flops(partial(family.embed, example)),
            {node: _flops(partial(family.blocks.at, node, state)) for node in family.tree.nodes},
            {node: _flops(partial(family.head_at(node), state)) for node in family.tree.exits},
        )
        sizes = {node: _size(family.blocks.module(node)) for node in family.tree.nodes}
        heads = {node: _size(family.head_at(node)) for node in family.tree.exits}
    return flops, Cost(_size(family.embed), sizes, heads)


@contextmanager
def without_fused_kernels() -> Iterator[None]:
    """Let torch's own transformer layers run as the operators that they are made of, which can be exported and counted."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())
