"""The pictures of the README: `python -m benchmarks.figures runs/digits models/digits/1`, or `make figures`.

- tree.png: the tree of the family and its ladder.
- anytime.png: test accuracy against measured time, for every path at batch 1, and for climbing the ladder until the
  answer is confident enough, at thresholds from 0.3 to 0.999.
"""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path as FilePath

import click
import numpy as np
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from benchmarks.anytime import threshold_point
from benchmarks.outcomes import probabilities_of
from family.manifest import Manifest, load_manifest
from family.tree import Path, format_path
from service.policy.state import segment_between
from service.profile import Segment
from service.runtime import Runtime
from training.checkpoint import load_run_config
from training.diagrams import plot_tree
from training.plots import ACCENT, INK, QUIET
from training.sources import load_data_of

IMAGES = FilePath(__file__).parents[1] / "docs" / "images"
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
_REPEATS = 200


@click.command()
@click.argument("run", type=click.Path(path_type=FilePath, exists=True, file_okay=False))
@click.argument("bundle", type=click.Path(path_type=FilePath, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=FilePath), default=IMAGES, show_default=True)
def main(run: FilePath, bundle: FilePath, out: FilePath) -> None:
    """Draw tree.png and anytime.png from the bundle that was exported from RUN."""
    out.mkdir(parents=True, exist_ok=True)
    manifest = load_manifest(bundle)
    test = load_data_of(run, load_run_config(run).data).test
    runtime = Runtime(bundle, manifest, threads=1, device="cpu")
    plot_tree(manifest.tree, out / "tree.png")

    steps = [segment_between(before, path) for before, path in itertools.pairwise(((), *manifest.climb))]
    median_s = measure(runtime, manifest, {Segment(path, embed=True) for path in manifest.offered} | set(steps))
    paths = {path: (median_s[Segment(path, embed=True)], entry.test.accuracy) for path, entry in manifest.offered.items()}
    rungs = np.stack([probabilities_of(bundle, manifest, path, test) for path in manifest.climb])
    costs_s, blocks = np.cumsum([median_s[step] for step in steps]), np.array([len(path) for path in manifest.climb], float)
    climbs = {}
    for threshold in THRESHOLDS:
        seconds, accuracy = threshold_point(rungs, costs_s, test.labels.numpy(), threshold)
        climbs[threshold] = seconds, accuracy, threshold_point(rungs, blocks, test.labels.numpy(), threshold)[0]
    draw(manifest, paths, climbs, out / "anytime.png")

    table = Table(title="climbing until confident: test accuracy, mean blocks, mean inference time of a row")
    for column in ("min_confidence", "accuracy", "blocks", "time"):
        table.add_column(column, justify="right")
    for threshold, (seconds, accuracy, depth) in climbs.items():
        table.add_row(f"{threshold:g}", f"{100 * accuracy:.1f} %", f"{depth:.2f}", f"{1e6 * seconds:.0f} us")
    console = Console()
    console.print(table)
    reference_s, reference_accuracy = paths[manifest.reference]
    console.print(
        f"reference path {format_path(manifest.reference)}: {100 * reference_accuracy:.1f} %, {1e6 * reference_s:.0f} us; "
        f"wrote {out}/tree.png and {out}/anytime.png"
    )


def measure(runtime: Runtime, manifest: Manifest, segments: set[Segment]) -> dict[Segment, float]:
    """Median seconds of each segment for one row. All are timed in turn, so that drift hits all alike."""
    x = np.zeros((1, *manifest.input.shape[1:]), np.float32)
    state = np.zeros((1, *manifest.state.shape[1:]), np.float32)
    times: dict[Segment, list[float]] = {segment: [] for segment in segments}
    for _ in range(_REPEATS):
        for segment, taken in times.items():
            start = time.perf_counter()
            runtime.run(segment.nodes, x if segment.embed else state, embed=segment.embed, keep_state=not segment.embed)
            taken.append(time.perf_counter() - start)
    return {segment: statistics.median(taken) for segment, taken in times.items()}


def draw(
    manifest: Manifest,
    paths: dict[Path, tuple[float, float]],
    climbs: dict[float, tuple[float, float, float]],
    file: FilePath,
) -> None:
    """Accuracy against time."""
    figure, axes = plt.subplots(figsize=(8, 4.6))
    best = list(manifest.best_by_depth.values())
    dots = [point(seconds, accuracy) for seconds, accuracy in paths.values()]
    axes.scatter([x for x, _ in dots], [y for _, y in dots], s=16, color=QUIET, label="a path")
    line = [point(*paths[path]) for path in best]
    axes.plot(*zip(*line, strict=True), marker="o", color=INK, label="depth=d: the path that is best on validation")
    for path, spot in zip(best, line, strict=True):
        axes.annotate(str(len(path)), spot, xytext=(0, -16), textcoords="offset points", ha="center")
    curve = [point(seconds, accuracy) for seconds, accuracy, _ in climbs.values()]
    name = f"min_confidence {THRESHOLDS[0]:g} to {THRESHOLDS[-1]:g}, mean time"
    axes.plot(*zip(*curve, strict=True), marker="s", markersize=4, color=ACCENT, label=name)
    axes.margins(y=0.12)
    axes.set(xlabel="inference time of one digit, microseconds", ylabel="test accuracy, %")
    axes.set_title(f"{manifest.name}: the anytime curve")
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def point(seconds: float, accuracy: float) -> tuple[float, float]:
    """In the units of the axes: microseconds, percent."""
    return 1e6 * seconds, 100 * accuracy


if __name__ == "__main__":
    main()
