"""How a path does on each class: where classes are unbalanced, its accuracy is that of the frequent ones."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from family.tree import Path, format_path

CLASSES_FILE = "classes.csv"


@dataclass(frozen=True, slots=True)
class ClassScores:
    """A path on one split, by class; arrays are `(classes,)`.

    `rows` are those of the class, `recall` is the share of them that is answered right, `precision` the share of the
    answers with this class that are right, 0..1. NaN where there is no such row or no such answer.
    """

    rows: NDArray[np.int64]
    recall: NDArray[np.float64]
    precision: NDArray[np.float64]

    @property
    def balanced_accuracy(self) -> float:
        """The mean recall of the classes that have rows: what accuracy would be if all were equally frequent."""
        return float(np.nanmean(self.recall))


def score_classes(answer: NDArray[np.integer], labels: NDArray[np.integer], classes: int) -> ClassScores:
    """Compare answers with labels, both `(rows,)` numbers of classes below `classes`."""
    rows, given, right = (np.bincount(of, minlength=classes) for of in (labels, answer, labels[answer == labels]))
    recall, precision = (
        np.divide(right, counted, out=np.full(classes, np.nan), where=counted > 0) for counted in (rows, given)
    )
    return ClassScores(rows, recall, precision)


def classes_csv(scores: Mapping[Path, ClassScores], names: Sequence[str]) -> str:
    """A line for each path and class; cells are empty where there is nothing to divide by."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "depth", "class", "rows", "recall", "precision"])
    for path, found in scores.items():
        for name, rows, *shares in zip(names, found.rows.tolist(), found.recall, found.precision, strict=True):
            cells = ("" if np.isnan(share) else f"{share:.6g}" for share in shares)
            writer.writerow([format_path(path), len(path), name, rows, *cells])
    return text.getvalue()
