"""The anytime curve of a bundle, and how often going deeper makes the truth less probable.

python -m benchmarks.anytime [bundle] [--out docs/bench]
"""

from __future__ import annotations

import itertools
from pathlib import Path as FilePath

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.outcomes import digits_of, probabilities_of
from benchmarks.plots import draw_anytime
from benchmarks.simulate import DEFAULT_BUNDLE, open_world
from benchmarks.simulation import Hardware
from family.manifest import load_manifest
from family.tree import format_path
from service.policy.state import segment_between
from service.profile import LatencyProfile, Segment

Floats = NDArray[np.float64]


@click.command()
@click.argument("bundle", type=click.Path(path_type=FilePath, exists=True, file_okay=False), default=DEFAULT_BUNDLE)
@click.option("--out", type=click.Path(path_type=FilePath, file_okay=False), help="Folder for anytime.png.")
def main(bundle: FilePath, out: FilePath | None) -> None:
    """Measure BUNDLE on the test digits it has never seen."""
    manifest = load_manifest(bundle)
    test = digits_of(manifest)
    labels: NDArray[np.int64] = test.labels.numpy()
    rungs = np.stack([probabilities_of(bundle, manifest, path, test) for path in manifest.climb])
    console = Console()

    table = Table(title="going deeper along the climb " + " > ".join(map(format_path, manifest.climb)))
    for column in ("answers", "share whose truth ever gets less probable, %", "final accuracy, %"):
        table.add_column(column, justify="left" if column == "answers" else "right")
    for name, answers in (("plain", rungs), ("best so far", best_so_far(rungs)), ("product of experts", product(rungs))):
        truth = answers[:, np.arange(len(labels)), labels]
        falls = float((np.diff(truth, axis=0) < -1e-9).any(axis=0).mean())
        accuracy = float((answers[-1].argmax(axis=1) == labels).mean())
        table.add_row(name, f"{100 * falls:.1f}", f"{100 * accuracy:.1f}")
    console.print(table)

    profile = LatencyProfile(open_world(bundle, Hardware()).machine.parts)
    points = [
        (format_path(path), 1000 * profile.typical_s(Segment(path, embed=True), 1), entry.test.accuracy)
        for path, entry in manifest.offered.items()
        if path in manifest.front or path in manifest.climb
    ]
    steps = itertools.pairwise(((), *manifest.climb))
    costs = np.cumsum([profile.typical_s(segment_between(before, path), 1) for before, path in steps])
    curve = [threshold_point(rungs, costs, labels, threshold) for threshold in np.linspace(0, 1, 101)]
    seconds, accuracies = (np.array(each) for each in zip(*curve, strict=True))
    if len(costs) > 1:  # else there is no time between the first answer and the last
        area = np.trapezoid(accuracies, seconds) + accuracies[-1] * (costs[-1] - seconds[-1])
        console.print(
            f"mean accuracy over the time from {1000 * costs[0]:.2f} to {1000 * costs[-1]:.2f} ms: "
            f"{100 * area / (costs[-1] - costs[0]):.2f} %"
        )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        draw_anytime(out / "anytime.png", points, {"climb until confident": [(1000 * s, a) for s, a in curve]})
        console.print(f"wrote {out / 'anytime.png'}")


def best_so_far(rungs: Floats) -> Floats:
    """The most confident answer up to each rung, `(rungs, rows, classes)`; a tie goes to the deeper one."""
    best = rungs.copy()
    for rung in range(1, len(rungs)):
        keep = best[rung - 1].max(axis=1) > rungs[rung].max(axis=1)
        best[rung, keep] = best[rung - 1, keep]
    return best


def product(rungs: Floats) -> Floats:
    """The normalised product of the probabilities up to each rung, `(rungs, rows, classes)`."""
    logarithms = np.cumsum(np.log(np.maximum(rungs, 1e-12)), axis=0)
    values = np.exp(logarithms - logarithms.max(axis=2, keepdims=True))
    return np.asarray(values / values.sum(axis=2, keepdims=True))


def threshold_point(rungs: Floats, costs: Floats, labels: NDArray[np.int64], threshold: float) -> tuple[float, float]:
    """Mean cost (whatever `costs (rungs,)` are in) and accuracy of climbing until the confidence reaches the threshold."""
    confident = rungs.max(axis=2) >= threshold
    confident[-1] = True
    stops = confident.argmax(axis=0)
    rows = np.arange(len(labels))
    return float(costs[stops].mean()), float((rungs[stops, rows].argmax(axis=1) == labels).mean())


if __name__ == "__main__":
    main()
