"""Rows and labels -> the four splits: stratified by class and seeded, or from files of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from training.data_config import SplitConfig
from training.dataset import DataError, Split


class Splits(NamedTuple):
    """The four, in the order of a `Dataset`."""

    train: Split
    validation: Split
    certification: Split
    test: Split


Rows = tuple[NDArray[np.float32], NDArray[np.generic]]
"""Inputs `(rows, *input_shape)`, and for each row its label `(rows,)`, a number or text."""


def load_splits(read: Callable[[Path], Rows], source: Path, config: SplitConfig) -> tuple[Splits, tuple[str, ...]]:
    """The four splits, and the labels: numbers by size, text by letters.

    What `config` wants as a share is drawn from the rows of `source`, what it names is read, by `read`.

    Raises:
        DataError: a class has too few rows, there is only one, or a file has a class that no row to train on has.
    """
    x, values = read(source)
    labels = tuple(str(value) for value in np.unique(values).tolist())
    if len(labels) < 2:
        raise DataError(f"{source}: expected at least two classes, got {', '.join(labels) or 'no rows'}")
    classes = _indices(values, labels, source)
    parts = {name: (x[rows], classes[rows]) for name, rows in stratify(classes, config.shares, labels, config.seed).items()}
    for name, file in config.files.items():
        other, other_values = read(file)
        if other.shape[1:] != x.shape[1:]:
            raise DataError(
                f"{file}: expected rows of shape {list(x.shape[1:])} as in {source}, got {list(other.shape[1:])}"
            )
        if not len(other):
            raise DataError(f"{file} has no rows")
        parts[name] = other, _indices(other_values, labels, file)
    return Splits(*(Split(*map(torch.from_numpy, parts[name])) for name in Splits._fields)), labels


def stratify(
    classes: NDArray[np.int64], shares: Mapping[str, float], labels: Sequence[str], seed: int
) -> dict[str, NDArray[np.intp]]:
    """Draw rows for each of `shares` (name -> 0..1) and, as `train`, what is left: every class with its own share of each.

    `classes` is `(rows,)`, the index of each row's label. Rows are in random order in every split.

    Raises:
        DataError: a class has too few rows for every split to have one.
    """
    rng = np.random.default_rng([seed, 0])
    members: dict[str, list[NDArray[np.intp]]] = {name: [] for name in ("train", *shares)}
    for index, label in enumerate(labels):
        rows = rng.permutation(np.flatnonzero(classes == index))
        counts = {name: max(1, round(share * len(rows))) for name, share in shares.items()}
        if sum(counts.values()) >= len(rows):
            raise DataError(
                f"class {label!r} has {len(rows)} rows, too few for one in each of {', '.join(members)}: leave it out, "
                "or add rows. (Classes are what is predicted here, not numbers: this is no regression)"
            )
        start = 0
        for name, count in counts.items():
            members[name].append(rows[start : start + count])
            start += count
        members["train"].append(rows[start:])
    return {name: rng.permutation(np.concatenate(parts)) for name, parts in members.items()}


def _indices(values: NDArray[np.generic], labels: Sequence[str], file: Path) -> NDArray[np.int64]:
    numbers = {label: number for number, label in enumerate(labels)}
    found = np.array([numbers.get(str(value), -1) for value in values.tolist()], np.int64)
    if (found < 0).any():
        row = int(np.argmax(found < 0))
        raise DataError(f"{file}, row {row + 1}: no row to train on has the class {str(values[row])!r}")
    return found
