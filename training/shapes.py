"""What a family's modules make of a row, found by running each once: that they fit together, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from training.model import Family


class ShapeError(ValueError):
    """A module that does not fit the others; the message names its node and the expected and got shapes."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """Shapes without the axis of rows, and the number of classes."""

    input: tuple[int, ...]
    state: tuple[int, ...]
    classes: int


@torch.no_grad()
def shapes_of(family: Family, x: Tensor) -> Shapes:
    """Run the embedding, each block and the head on `x` `(rows, *input_shape) float32`, of at least two rows.

    Raises:
        ShapeError: a module fails on what it is given, or gives another shape or type than the others need.
    """
    was_training = family.training
    family.eval()
    try:
        state = _run("the embedding", family.embed, x)
        if state.ndim < 2 or len(state) != len(x):
            raise ShapeError(f"the embedding: expected a state of shape [{len(x)}, ...], got {list(state.shape)}")
        for node in family.tree.nodes:
            after = _run(f"the block of node {node}", partial(family.blocks.at, node), state)
            if after.shape != state.shape:
                raise ShapeError(
                    f"the block of node {node}: expected a state of shape {list(state.shape)}, like the one that it reads, "
                    f"got {list(after.shape)}"
                )
        classes = {node: _classes(family, node, state) for node in family.tree.exits}
        if len(set(classes.values())) > 1:
            raise ShapeError(f"the heads: expected as many logits of each, got by nodes {classes}")
    finally:
        family.train(was_training)
    return Shapes(tuple(x.shape[1:]), tuple(state.shape[1:]), classes[family.tree.root])


def _classes(family: Family, node: int, state: Tensor) -> int:
    name = "the head" if family.shares_head else f"the head of node {node}"
    logits = _run(name, family.head_at(node), state)
    if logits.ndim != 2 or len(logits) != len(state):
        raise ShapeError(f"{name}: expected logits of shape [{len(state)}, classes], got {list(logits.shape)}")
    return logits.shape[1]


def _run(name: str, module: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
    try:
        result = module(given)
    except (RuntimeError, ValueError, TypeError, IndexError) as exc:  # torch's words for a shape that does not fit
        raise ShapeError(f"{name} fails on an input of shape {list(given.shape)}: {exc}") from exc
    if not isinstance(result, Tensor) or result.dtype != torch.float32:
        got = result.dtype if isinstance(result, Tensor) else type(result).__name__
        raise ShapeError(f"{name}: expected a float32 tensor, got {got}")
    return result
