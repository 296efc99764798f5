"""Which path to offer: the best of each depth, the reference path, the Pareto front. Pure, over accuracies.

The accuracies passed in are those on validation data; the test set never chooses.
"""

from __future__ import annotations

from collections.abc import Mapping

from family.tree import Path, Tree


def preference(tree: Tree, path: Path, accuracy: float) -> tuple[float, int, bool, tuple[int, ...]]:
    """A sort key, greatest first: accuracy, then fewer blocks, then the ladder's path, then the smaller nodes."""
    return accuracy, -len(path), path in tree.ladder, tuple(-node for node in path)


def best_by_depth(tree: Tree, accuracies: Mapping[Path, float]) -> dict[int, Path]:
    """For each depth that occurs, in rising order, the preferred path of that many blocks."""
    best: dict[int, Path] = {}
    for path in sorted(accuracies, key=lambda path: preference(tree, path, accuracies[path])):
        best[len(path)] = path
    return dict(sorted(best.items()))


def reference_path(tree: Tree, accuracies: Mapping[Path, float]) -> Path:
    """The path that the others are compared with: the best one on validation, which need not be the longest.

    Raises:
        ValueError: there are no paths.
    """
    return max(accuracies, key=lambda path: preference(tree, path, accuracies[path]))


def climb(tree: Tree, accuracies: Mapping[Path, float]) -> tuple[Path, ...]:
    """The fixed sequence of paths at which a row that goes deeper gets its answers: the ladder's rungs that are
    shallower than the reference path, each more accurate than the one before, and at the end the reference path. Where
    nothing of the ladder is offered: the Pareto front, which ends there too."""
    reference = reference_path(tree, accuracies)
    targets: list[Path] = []
    for path in [path for path in tree.ladder if path in accuracies] or pareto_front(tree, accuracies):
        best = accuracies[targets[-1]] if targets else -1.0
        if len(path) < len(reference) and best < accuracies[path]:
            targets.append(path)
    return (*targets, reference)


def pareto_front(tree: Tree, accuracies: Mapping[Path, float]) -> tuple[Path, ...]:
    """The paths worth running, shallowest first: each more accurate than everything with fewer or as many blocks.

    Its last element is the reference path.
    """
    front: list[Path] = []
    for path in best_by_depth(tree, accuracies).values():
        if not front or accuracies[path] > accuracies[front[-1]]:
            front.append(path)
    return tuple(front)
