"""The report on a finished family: the table that is printed, `metrics.json` and the pictures."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from family.tree import format_path
from training.assessment import METRICS_FILE, assess, climb_until, write_metrics
from training.config import RunConfig
from training.dataset import Dataset
from training.diagrams import plot_accuracy, plot_reliability, plot_use
from training.methods import trained_paths
from training.model import Family
from training.progress import console

MIN_CONFIDENCE = 0.9
"""Of the climb whose use of the tree is drawn, if nothing else is said."""

_COLUMNS = "depth", "MFLOP", "val.", "test", "loss", "ECE", "T", "ECE/T", "agree", ""


def report(run: RunConfig, family: Family, data: Dataset, out: Path, min_confidence: float = MIN_CONFIDENCE) -> None:
    """Measure all trained paths, print the table, write metrics.json and the pictures in the folder `out`."""
    tree = family.tree
    assessment = assess(family, data, trained_paths(run, tree, tuple(tree.paths())))
    table = Table(
        title=f"{run.name}: {len(assessment.paths)} path(s), {run.train.method}, seed {run.train.seed}",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("path", overflow="fold")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for path, result in assessment.paths.items():
        test = result.test
        notes = {
            "ref.": path == assessment.reference,
            "front": result.on_front,
            "best": result.best_of_depth,
        }
        table.add_row(
            format_path(path),
            str(result.depth),
            f"{result.flops / 1e6:.3g}",
            f"{100 * result.validation.accuracy:.1f}",
            f"{100 * test.accuracy:.1f}",
            f"{test.loss:.3f}",
            f"{100 * test.calibration_error:.1f}",
            f"{result.temperature:.2f}",
            f"{100 * test.scaled_calibration_error:.1f}",
            f"{100 * test.agreement:.1f}",
            next((note for note, holds in notes.items() if holds), ""),
        )
    console.print(table)
    console.print(
        "val., test: accuracy, %; what follows is on test data. loss: nats. ECE: expected calibration error, %, before and "
        "after scaling by the temperature T. agree: with the reference path (ref.), %. front: on the Pareto front; best: "
        "of its depth."
    )
    climb = climb_until(assessment, min_confidence)
    console.print(
        f"Climbing until {100 * min_confidence:g} % confident: {100 * climb.accuracy:.1f} % right after "
        f"{climb.blocks:.2f} blocks on average."
    )
    write_metrics(out, assessment.paths)
    plot_accuracy(assessment, run.name, out / "accuracy.png")
    plot_reliability(assessment, run.name, out / "reliability.png")
    plot_use(tree, climb, run.name, out / "tree.png")
    console.print(f"wrote {METRICS_FILE}, accuracy.png, reliability.png and tree.png in {out}")
