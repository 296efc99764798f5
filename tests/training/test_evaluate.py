from __future__ import annotations

import torch

from family.tree import Tree
from tests.conftest import SMALL_VIT
from training.evaluate import path_logits, watched_paths
from training.model import build_family


def test_shared_prefixes_give_each_paths_own_logits() -> None:
    family = build_family(SMALL_VIT, seed=1)
    images = torch.rand(4, 28, 28)
    logits = dict(path_logits(family, images, family.tree.paths()))
    assert len(logits) == 25
    for path, shared in logits.items():
        with torch.no_grad():
            torch.testing.assert_close(shared, family(images, path), atol=1e-5, rtol=1e-5)


def test_each_distinct_prefix_runs_once(monkeypatch: object) -> None:
    family = build_family(SMALL_VIT, seed=1)
    runs = []
    at = family.blocks.at
    family.blocks.at = lambda node, state: runs.append(node) or at(node, state)  # type: ignore[method-assign, func-returns-value]
    for _ in path_logits(family, torch.rand(2, 28, 28), family.tree.paths()):
        pass
    assert len(runs) == 35


def test_large_trees_are_watched_in_part() -> None:
    assert len(watched_paths(Tree(3))) == 25
    few = watched_paths(Tree(4))
    assert set(Tree(4).ladder) <= set(few)
    assert {len(path) for path in few} == set(range(1, 16))
