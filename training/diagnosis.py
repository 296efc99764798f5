"""Where a number that is not finite comes from: asked once a loss is NaN or infinite, so it costs nothing before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from family.tree import Path, format_path
from training.blocks import StackedBlocks
from training.model import Family


@torch.no_grad()
def diagnose(family: Family, x: Tensor) -> str:
    """The first part of `family` that is not finite on the batch `x`, as half a sentence: a parameter, input or layer."""
    for name, parameter in family.named_parameters():
        if not parameter.isfinite().all():
            return f"the parameter {_with_node(family, name, parameter)} is not finite any more"
    if not x.isfinite().all():
        return f"the input is not finite in row {int((~x.isfinite()).flatten(1).any(dim=1).nonzero()[0])} of the batch"
    family.eval()
    try:
        with _watched(family) as layers:
            state = family.embed(x)
            if not state.isfinite().all():
                return f"the embedding gives what is not finite{_first(layers)}"
            largest = 0.0
            for path in sorted(_prefixes(family), key=len):
                state = family.embed(x)
                for node in path:
                    state = family.blocks.at(node, state)
                if not state.isfinite().all():
                    return f"the block of node {path[-1]} gives what is not finite, after {_before(path)}{_first(layers)}"
                largest = max(largest, float(state.abs().max()))
                if family.tree.is_hop(path[-1], family.tree.n) and not family.head_at(path[-1])(state).isfinite().all():
                    return f"the head gives what is not finite, after the blocks of {format_path(path)}{_first(layers)}"
    finally:
        family.train()
    return f"all layers are finite on this batch, so the loss itself overflowed; the largest state is {largest:.3g}"


def _prefixes(family: Family) -> Iterator[Path]:
    """The rungs of the ladder and the starts of the full path, which together visit every node."""
    tree = family.tree
    yield from tree.ladder
    yield from (tree.full[:length] for length in range(1, tree.n))


def _before(path: Path) -> str:
    return f"the blocks of {format_path(path[:-1])}" if len(path) > 1 else "the embedding"


def _with_node(family: Family, name: str, parameter: Tensor) -> str:
    if isinstance(family.blocks, StackedBlocks) and name.startswith("blocks."):
        node = int((~parameter.isfinite()).flatten(1).any(dim=1).nonzero()[0]) + 1
        return f"{name} of node {node}"
    return name


def _first(layers: list[str]) -> str:
    return f", first its layer {layers[0]}" if layers else ""


@contextmanager
def _watched(family: Family) -> Iterator[list[str]]:
    """The names of modules, the innermost first, in the order in which they gave what is not finite."""
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> Any:
        def look(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return module.register_forward_hook(look)

    handles = [watch(name, module) for name, module in family.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
