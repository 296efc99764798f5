"""Pictures of a family: its tree, with the use of each hop or without, accuracy over depth and FLOPs, reliability."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch

from family import tree as algebra
from family.choice import best_by_depth
from training.assessment import Assessment, Climb
from training.calibrate import reliability
from training.plots import ACCENT, INK, QUIET, write_figure


def plot_tree(tree: algebra.Tree, file: Path) -> None:
    """Draw nodes by level with all hops, the ladder's in colour."""
    figure, axes = plt.subplots(figsize=(9, 3.6))
    ladder = tree.ladder[-1]
    climbing = {(0, ladder[0]), *pairwise(ladder), *((node, tree.n) for node in ladder)}
    _draw_tree(axes, tree, dict.fromkeys(climbing, 1.8), set(ladder))
    axes.set_title(f"D={tree.hierarchy_depth}: {len(tree.nodes)} blocks, {tree.count_paths()} paths; the ladder in colour")
    write_figure(figure, file)


def plot_use(tree: algebra.Tree, climb: Climb, name: str, file: Path) -> None:
    """Draw the tree with each hop as wide as its use by the rows that climb; what none of them runs is thin and grey."""
    figure, axes = plt.subplots(figsize=(max(9, 0.75 * tree.n), 1.2 * tree.hierarchy_depth + 1))
    used = {hop: share for hop, share in climb.use.items() if share > 0}
    visited = {node for hop in used for node in hop}
    height = _draw_tree(axes, tree, {hop: 1 + 6 * share for hop, share in used.items()}, visited)
    for (start, end), share in used.items():
        axes.text(
            (start + end) / 2,
            (height[start] + height[end]) / 2,
            f"{100 * share:.0f} %" if share >= 0.005 else "< 1 %",
            ha="center",
            va="center",
            fontsize="small",
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            zorder=5,
        )
    axes.set_title(
        f"{name}: share of test inputs that run each hop, climbing until {100 * climb.min_confidence:g} % confident\n"
        f"{100 * climb.accuracy:.1f} % right after {climb.blocks:.2f} blocks on average; grey: hops that none of them runs",
        fontsize="medium",
    )
    write_figure(figure, file)


def plot_accuracy(assessment: Assessment, name: str, file: Path) -> None:
    """Test accuracy over depth and over FLOPs: a dot for each path, a line through the best of each depth, the Pareto front
    filled."""
    figure, (by_depth, by_flops) = plt.subplots(1, 2, figsize=(13, 4.4), sharey=True)
    metrics = assessment.paths
    best = best_by_depth(assessment.tree, {path: result.validation.accuracy for path, result in metrics.items()})
    for axes, cost in (
        (by_depth, {path: float(result.depth) for path, result in metrics.items()}),
        (by_flops, {path: result.flops / 1e6 for path, result in metrics.items()}),
    ):
        heights = {path: 100 * result.test.accuracy for path, result in metrics.items()}
        axes.scatter([*cost.values()], [*heights.values()], s=18, color=QUIET, label="a path")
        line = [(cost[path], heights[path]) for path in best.values()]
        axes.plot(*zip(*line, strict=True), color=ACCENT, label="best of its depth, by validation")
        for path, spot in zip(best.values(), line, strict=True):
            face = ACCENT if metrics[path].on_front else "white"
            axes.scatter(*spot, s=46, facecolor=face, edgecolor=ACCENT, zorder=3)
        axes.scatter([], [], s=46, color=ACCENT, label="on the Pareto front")
        axes.grid(axis="y", color=QUIET, alpha=0.3)
    by_depth.xaxis.get_major_locator().set_params(integer=True)
    by_depth.set(xlabel="depth (blocks run)", ylabel="test accuracy, %")
    by_flops.set(xlabel="FLOPs of one row, millions", xlim=(0, None))
    by_flops.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{name}: every path")
    write_figure(figure, file)


def plot_reliability(assessment: Assessment, name: str, file: Path) -> None:
    """Accuracy over confidence on test data, before and after temperature scaling, for every path of the climb."""
    paths = assessment.sequence
    columns = min(len(paths), 4)
    lines = math.ceil(len(paths) / columns)
    figure, grid = plt.subplots(lines, columns, figsize=(3.6 * columns + 0.6, 3.9 * lines + 0.8), squeeze=False)
    for axes in grid.flat[len(paths) :]:
        axes.set_visible(False)
    for axes, path in zip(grid.flat, paths, strict=False):
        result = assessment.paths[path]
        axes.plot([0, 100], [0, 100], color=QUIET, linewidth=1, linestyle=":")
        for scaled, colour in ((False, QUIET), (True, ACCENT)):
            found = (assessment.scaled if scaled else assessment.plain)[path]
            confidence, accuracy, rows = reliability(found.confidence, found.correct)
            error = result.test.scaled_calibration_error if scaled else result.test.calibration_error
            label = f"{f'T = {result.temperature:.2f}' if scaled else 'unscaled'}: ECE {100 * error:.1f} %"
            axes.plot(100 * confidence, 100 * accuracy, color=colour, linewidth=1)
            axes.scatter(100 * confidence, 100 * accuracy, s=5 + 250 * rows / rows.sum(), color=colour, alpha=0.8)
            axes.plot([], [], color=colour, marker="o", label=label)
        axes.set(xlabel="confidence, %", ylabel="test accuracy, %", xlim=(0, 103), ylim=(0, 103), title=_title(path))
        axes.legend(frameon=False, fontsize="small", loc="upper left")
    figure.suptitle(f"{name}: reliability of the paths of the climb; a dot's area is its share of the rows")
    write_figure(figure, file)


def _title(path: algebra.Path) -> str:
    text = algebra.format_path(path)
    return f"path {text}" if len(text) < 28 else f"path of {len(path)} blocks"


def _draw_tree(axes: Axes, tree: algebra.Tree, widths: Mapping[algebra.Hop, float], coloured: set[int]) -> dict[int, float]:
    """Nodes by level and all hops, those of `widths` in colour and so wide; returns each node's height."""
    height = {node: float(tree.level(node)) for node in tree.nodes}
    height |= {0: float(tree.hierarchy_depth), tree.n: float(tree.hierarchy_depth)}
    for start, end in tree.hops:
        width = widths.get((start, end))
        axes.add_patch(
            FancyArrowPatch(
                (start, height[start]),
                (end, height[end]),
                arrowstyle="-|>",
                mutation_scale=12,
                shrinkA=15,
                shrinkB=15,
                linestyle="-" if height[end] < height[start] else "--",
                color=QUIET if width is None else ACCENT,
                linewidth=width or 1,
                zorder=1 if width is None else 2,
            )
        )
    for node, y in height.items():
        name = {0: "x", tree.n: "y"}.get(node, str(node))
        colour = ACCENT if node in coloured else INK
        axes.scatter(node, y, s=620, color="white", edgecolor=colour, linewidth=1.6, zorder=3)
        axes.text(node, y, name, ha="center", va="center", color=colour, zorder=4)
    axes.set_ylim(-0.6, tree.hierarchy_depth + 0.5)
    axes.axis("off")
    return height
