from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from family.tree import Tree, format_path
from tests.conftest import SMALL_VIT, Trained
from training.assessment import (
    Assessment,
    PathMetrics,
    SplitMetrics,
    assess,
    climb_until,
    read_metrics,
    write_metrics,
)
from training.calibrate import answers
from training.checkpoint import CheckpointError, load_family
from training.cost import costs
from training.dataset import Dataset
from training.diagrams import plot_accuracy, plot_reliability, plot_use
from training.evaluate import path_logits, score_paths
from training.model import build_family

TREE = Tree(2)


def _path(depth: int, accuracy: float) -> PathMetrics:
    split = SplitMetrics(accuracy, 1, 0, 0, 0, 0)
    return PathMetrics(depth, 0, 0, 1.0, True, True, split, split)


def _assessment(accuracies: dict[tuple[int, ...], float], given: dict[tuple[int, ...], list[float]]) -> Assessment:
    """Two classes, and the right one is always 1: `given` are the probabilities that a path gives it, row by row."""
    logits = {path: np.array([[0, np.log(p / (1 - p))] for p in rows], np.float32) for path, rows in given.items()}
    found = {path: answers(values, np.ones(4, np.int64)) for path, values in logits.items()}
    metrics = {path: _path(len(path), accuracy) for path, accuracy in accuracies.items()}
    return Assessment(TREE, metrics, found, found)


def test_rows_leave_a_climb_at_the_first_path_that_is_confident() -> None:
    found = _assessment(
        {(2,): 0.7, (2, 3): 0.9},
        {(2,): [0.99, 0.95, 0.6, 0.4], (2, 3): [0.1, 0.1, 0.99, 0.2]},
    )
    climb = climb_until(found, 0.9)
    assert climb.use == {(0, 1): 0, (0, 2): 1, (1, 2): 0, (2, 3): 0.5, (2, 4): 1, (3, 4): 0.5}
    assert climb.blocks == 1.5
    assert climb.accuracy == 0.75  # two right answers of path 2, which 2-3 would have got wrong, and one of two of 2-3


def test_a_climb_that_starts_again_counts_its_blocks_again_and_its_hops_once() -> None:
    found = _assessment(
        {(2,): 0.7, (1, 2, 3): 0.9},
        {(2,): [0.99, 0.6, 0.6, 0.6], (1, 2, 3): [0.1, 0.9, 0.9, 0.9]},
    )
    climb = climb_until(found, 0.9)
    assert climb.use == {(0, 1): 0.75, (0, 2): 1, (1, 2): 0.75, (2, 3): 0.75, (2, 4): 1, (3, 4): 0.75}
    assert climb.blocks == 1 + 0.75 * 3
    assert climb.accuracy == 1


def test_a_trained_family_is_measured_path_by_path(trained: Trained, digits: Dataset, tmp_path: Path) -> None:
    _, family, _ = load_family(trained.run)
    paths = tuple(family.tree.paths())
    found = assess(family, digits, paths)
    plain = score_paths(family, digits.test, paths)
    bundle = {entry.path: entry for entry in trained.manifest.paths}
    for path, metrics in found.paths.items():
        assert metrics.test.accuracy == plain[path].accuracy
        assert metrics.test.loss == pytest.approx(plain[path].loss, abs=1e-6)
        entry = bundle[format_path(path)]  # what export finds by itself, and the service goes by
        assert (metrics.flops, metrics.parameters) == (entry.flops, entry.parameters)
        assert metrics.temperature == pytest.approx(entry.temperature)
        assert metrics.test.scaled_calibration_error == pytest.approx(entry.test.calibration_error)
        assert metrics.test.agreement == pytest.approx(entry.test.agreement)
    assert found.reference == trained.manifest.reference
    assert found.paths[found.reference].test.agreement == 1
    assert [path for path, metrics in found.paths.items() if metrics.on_front] == list(trained.manifest.front)
    climb = climb_until(found, 0.9)
    assert climb_until(found, 0).accuracy == plain[found.sequence[0]].accuracy
    assert climb_until(found, 1).accuracy == plain[found.reference].accuracy
    for number, draw in enumerate((plot_accuracy, plot_reliability)):
        draw(found, "digits", tmp_path / f"{number}.png")
    plot_use(found.tree, climb, "digits", tmp_path / "2.png")
    assert all((tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG") for number in range(3))


def test_the_logits_of_all_paths_are_never_held_together(monkeypatch: pytest.MonkeyPatch, digits: Dataset) -> None:
    """Of 50,000 classes those of one path are large."""
    family = build_family(SMALL_VIT, seed=1)
    most = 0

    def watched(*args):
        nonlocal most
        alive = []
        for path, logits in path_logits(*args):
            alive = [ref for ref in alive if not ref.expired()] + [StorageWeakRef(logits.untyped_storage())]
            most = max(most, len(alive))
            yield path, logits

    monkeypatch.setattr("training.assessment.path_logits", watched)
    assess(family, digits, tuple(family.tree.paths()))
    assert 1 <= most <= 2


def test_metrics_are_read_back_and_those_of_another_version_are_named(tmp_path: Path) -> None:
    metrics = {(2,): _path(1, 0.5), (1, 2): _path(2, 0.75)}
    write_metrics(tmp_path, metrics)
    assert read_metrics(tmp_path) == metrics
    content = json.loads((tmp_path / "metrics.json").read_text())
    del content["1-2"]["flops"]
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"metrics.json does not hold what is measured of a path \(1 problems\)"):
        read_metrics(tmp_path)


def test_costs_add_up(trained: Trained) -> None:
    _, family, _ = load_family(trained.run)
    flops, parameters = costs(family, torch.zeros(1, 28, 28))
    of_other_heads = parameters.heads[4] + parameters.heads[6]
    assert parameters.of(family.tree.full) + of_other_heads == sum(p.numel() for p in family.parameters())
    # one block of width 16 on 4 tokens: qkv, scores, mixing, projection, up, down; a multiply-add counts two
    assert flops.blocks[1] == 2 * (4 * 16 * 48 + 4 * 4 * 16 + 4 * 4 * 16 + 4 * 16 * 16 + 2 * 4 * 16 * 16)
