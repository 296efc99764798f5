"""The report on a finished family: the tables that are printed, `metrics.json`, `classes.csv` and the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from family import tree as algebra
from family.tree import format_path
from training.assessment import METRICS_FILE, assess, climb_until, write_metrics
from training.checkpoint import write_atomically
from training.classes import CLASSES_FILE, ClassScores, classes_csv, score_classes
from training.config import RunConfig
from training.dataset import Dataset
from training.diagrams import plot_accuracy, plot_reliability, plot_use
from training.methods import trained_paths
from training.model import Family
from training.progress import console

MIN_CONFIDENCE = 0.9
"""Of the climb whose use of the tree is drawn, if nothing else is said."""

_CLASSES_SHOWN = 10

_COLUMNS = "depth", "MFLOP", "val.", "test", "loss", "ECE", "T", "ECE/T", "agree", ""


def report(run: RunConfig, family: Family, data: Dataset, out: Path, min_confidence: float = MIN_CONFIDENCE) -> None:
    """Measure all trained paths, print what was found, write metrics.json, classes.csv and pictures in the folder `out`."""
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
    labels = data.spec.labels
    by_class = {
        path: score_classes(assessment.plain[path].answer, data.test.labels.numpy(), len(labels))
        for path in assessment.paths
        if path in tree.ladder or path == assessment.reference
    }
    console.print(_class_table(by_class, assessment.reference, labels))
    console.print(
        "By path: recall, the share of a class's test rows that is answered right, %. precision: of the answers with it, "
        f"by the reference path. balanced: the mean recall of the classes. {CLASSES_FILE} has all {len(labels)} classes."
    )
    write_metrics(out, assessment.paths)
    write_atomically(out / CLASSES_FILE, classes_csv(by_class, labels).encode())
    plot_accuracy(assessment, run.name, out / "accuracy.png")
    plot_reliability(assessment, run.name, out / "reliability.png")
    plot_use(tree, climb, run.name, out / "tree.png")
    console.print(f"wrote {METRICS_FILE}, {CLASSES_FILE}, accuracy.png, reliability.png and tree.png in {out}")


def _class_table(scores: Mapping[algebra.Path, ClassScores], reference: algebra.Path, names: Sequence[str]) -> Table:
    """The classes of which the reference path misses most, worst first; of those without rows nothing is known."""
    of_reference = scores[reference]
    known = np.count_nonzero(of_reference.rows)
    worst = np.lexsort((of_reference.rows, of_reference.recall))[: min(known, _CLASSES_SHOWN)]
    title = f"the {len(worst)} worst of {known} classes" if len(worst) < known else "classes, the worst first"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("class", overflow="ellipsis", no_wrap=True, max_width=24)
    table.add_column("rows", justify="right", no_wrap=True)
    for path in scores:
        table.add_column(format_path(path) + " (ref.)" * (path == reference), justify="right", overflow="fold")
    table.add_column("precision", justify="right", no_wrap=True)
    for index in worst:
        recalls = (_percent(found.recall[index]) for found in scores.values())
        table.add_row(Text(names[index]), str(of_reference.rows[index]), *recalls, _percent(of_reference.precision[index]))
    table.add_section()
    balanced = (_percent(found.balanced_accuracy) for found in scores.values())
    table.add_row("balanced", str(of_reference.rows.sum()), *balanced)
    return table


def _percent(share: float) -> str:
    return "-" if np.isnan(share) else f"{100 * share:.1f}"
