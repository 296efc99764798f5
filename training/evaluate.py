"""Evaluation of many paths of one family, sharing the states of common prefixes: what training watches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from family.tree import Path, Tree
from training.dataset import Split
from training.model import Family


@torch.no_grad()
def path_logits(family: Family, images: Tensor, paths: Iterable[Path]) -> Iterator[tuple[Path, Tensor]]:
    """Every path with its logits `(rows, classes) float32`, one after the other: of many classes they are large.

    A depth-first walk over the prefix tree of `paths`, so that each distinct prefix runs once: at D=3 the 25 paths
    make 105 block runs, of which 35 are distinct.
    """

    def walk(prefix: Path, state: Tensor, below: Sequence[Path]) -> Iterator[tuple[Path, Tensor]]:
        if below and below[0] == prefix:
            yield prefix, family.head_at(prefix[-1])(state).cpu()
            below = below[1:]
        for node in dict.fromkeys(path[len(prefix)] for path in below):
            branch = [path for path in below if path[len(prefix)] == node]
            yield from walk((*prefix, node), family.blocks.at(node, state), branch)

    yield from walk((), family.embed(images.to(next(family.parameters()).device)), sorted(paths))


@dataclass(frozen=True, slots=True)
class PathScore:
    """`accuracy`: share of rows answered correctly, 0..1. `loss`: mean cross-entropy in nats."""

    accuracy: float
    loss: float


def score(logits: Tensor, labels: Tensor) -> PathScore:
    """Score logits `(rows, classes)` against labels `(rows,) int64`."""
    return PathScore(
        accuracy=(logits.argmax(dim=1) == labels).double().mean().item(),
        loss=F.cross_entropy(logits.double(), labels).item(),
    )


def score_paths(family: Family, split: Split, paths: Iterable[Path]) -> dict[Path, PathScore]:
    """Score every path on a split."""
    return {path: score(logits, split.labels) for path, logits in path_logits(family, split.x, paths)}


def watched_paths(tree: Tree, most: int = 32) -> tuple[Path, ...]:
    """Paths to validate while training: all where there are at most `most`, else the ladder and one of each depth."""
    if tree.count_paths() <= most:
        return tuple(tree.paths())
    one_of_each = (tree.path_at(depth, 0) for depth in tree.count_paths_by_depth())
    return tuple(dict.fromkeys((*tree.ladder, *one_of_each)))
