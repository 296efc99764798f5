"""What a finished family is worth: every path measured, a climb through it, and `metrics.json`, which keeps the first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path as FilePath

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from family.choice import best_by_depth, climb, pareto_front, reference_path
from family.tree import Hop, Path, Tree, extends, format_path
from training.calibrate import Answers, answers, fit_temperature, measure
from training.checkpoint import CheckpointError, write_atomically
from training.classes import score_classes
from training.cost import costs
from training.dataset import Dataset, Split
from training.evaluate import path_logits
from training.model import Family

METRICS_FILE = "metrics.json"

Both = tuple[Answers, Answers]
"""Of a path: what it answers by plain probabilities, and by scaled ones."""


@dataclass(frozen=True, slots=True)
class SplitMetrics:
    """A path on one split. `accuracy`, `agreement` (same answer as the reference path) and the expected calibration errors
    (15 equal bins) are shares, 0..1; losses are in nats a row. `scaled_...` are of `softmax(logits / temperature)`, the
    others of plain `softmax(logits)`. `balanced_accuracy`, the mean recall of the classes, is none in files from before
    there was one."""

    accuracy: float
    agreement: float
    loss: float
    calibration_error: float
    scaled_loss: float
    scaled_calibration_error: float
    balanced_accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class PathMetrics:
    """One path of a finished run.

    `flops` (of one row; a multiply-add counts two) and `parameters` include embedding and head. `temperature` is fitted on
    validation data. `best_of_depth`: no path of as many blocks is better on validation data. `on_front`: nor is one of
    fewer; the deepest of these is the reference path.
    """

    depth: int
    flops: int
    parameters: int
    temperature: float
    best_of_depth: bool
    on_front: bool
    validation: SplitMetrics
    test: SplitMetrics


@dataclass(frozen=True, slots=True)
class Assessment:
    """All of it. `plain` and `scaled` are what the metrics on test data are of, as those are."""

    tree: Tree
    paths: dict[Path, PathMetrics]
    plain: Mapping[Path, Answers]
    scaled: Mapping[Path, Answers]

    @property
    def reference(self) -> Path:
        """The best path on validation data."""
        return reference_path(self.tree, self._accuracies)

    @property
    def sequence(self) -> tuple[Path, ...]:
        """The paths at which a row that climbs gets its answers, as when the family is served."""
        return climb(self.tree, self._accuracies)

    @property
    def _accuracies(self) -> dict[Path, float]:
        return {path: metrics.validation.accuracy for path, metrics in self.paths.items()}


@dataclass(frozen=True, slots=True)
class Climb:
    """Test rows that go from path to path of a sequence until the calibrated confidence reaches `min_confidence`.

    `accuracy` is that of their answers, `blocks` the mean number of blocks that a row ran, `use` the share of rows that
    ran each hop, 0..1.
    """

    min_confidence: float
    accuracy: float
    blocks: float
    use: dict[Hop, float]


def assess(family: Family, data: Dataset, paths: Sequence[Path]) -> Assessment:
    """Measure paths on validation and test data. All choices, and temperatures, are made on validation data."""
    tree, classes = family.tree, len(data.spec.labels)
    device = next(family.parameters()).device
    flops, parameters = costs(family, data.validation.x[:1].to(device))
    validation, temperatures = _fit(family, data.validation, paths)
    test = _answer(family, data.test, temperatures)
    accuracies = {path: float(plain.correct.mean()) for path, (plain, _) in validation.items()}
    best, front = best_by_depth(tree, accuracies), pareto_front(tree, accuracies)  # which ends at the reference path
    found = {
        path: PathMetrics(
            depth=len(path),
            flops=flops.of(path),
            parameters=parameters.of(path),
            temperature=temperatures[path],
            best_of_depth=best[len(path)] == path,
            on_front=path in front,
            validation=_metrics(validation[path], validation[front[-1]], data.validation, classes),
            test=_metrics(test[path], test[front[-1]], data.test, classes),
        )
        for path in sorted(paths, key=lambda path: (len(path), path))
    }
    plain, scaled = ({path: both[place] for path, both in test.items()} for place in (0, 1))
    return Assessment(tree, found, plain, scaled)


def climb_until(assessment: Assessment, min_confidence: float) -> Climb:
    """Climb with every test row: as the service does on an idle server, where no time runs out."""
    rows = len(assessment.scaled[assessment.sequence[0]].answer)
    climbing, right, blocks = np.ones(rows, bool), np.zeros(rows, bool), 0.0
    use = dict.fromkeys(assessment.tree.hops, 0.0)
    before: Path = ()
    for target in assessment.sequence:
        share = float(climbing.mean())
        goes_on = bool(before) and extends(target, before)  # else it starts again from the input
        chain = (before[-1], *target[len(before) :]) if goes_on else (0, *target)
        blocks += share * (len(chain) - 1)
        for hop in pairwise((*chain, assessment.tree.n)):
            use[hop] = max(use[hop], share)  # those who run it again have run it before
        found = assessment.scaled[target]
        leaving = climbing & ((found.confidence >= min_confidence) | (target == assessment.sequence[-1]))
        right[leaving] = found.correct[leaving]
        climbing &= ~leaving
        before = target
    return Climb(min_confidence, float(right.mean()), blocks, use)


def write_metrics(folder: FilePath, metrics: Mapping[Path, PathMetrics]) -> None:
    """Write `metrics.json`: for every path, by its name, the fields of `PathMetrics`."""
    named = {format_path(path): result for path, result in metrics.items()}
    write_atomically(folder / METRICS_FILE, _METRICS.dump_json(named, indent=2))


def read_metrics(folder: FilePath) -> dict[Path, PathMetrics]:
    """Read back what `write_metrics` wrote.

    Raises:
        CheckpointError: the file is damaged, or from a version that measured less.
    """
    file = folder / METRICS_FILE
    try:
        named = _METRICS.validate_json(file.read_bytes())
    except ValidationError as exc:
        raise CheckpointError(
            f"{file} does not hold what is measured of a path ({exc.error_count()} problems): remove it to measure again"
        ) from exc
    return {tuple(map(int, name.split("-"))): result for name, result in named.items()}


_METRICS = TypeAdapter(dict[str, PathMetrics])


def _fit(family: Family, split: Split, paths: Sequence[Path]) -> tuple[dict[Path, Both], dict[Path, float]]:
    labels, found, temperatures = split.labels.numpy(), {}, {}
    for path, logits in _logits(family, split, paths):
        temperatures[path] = fit_temperature(logits, labels)
        found[path] = _both(logits, labels, temperatures[path])
    return found, temperatures


def _answer(family: Family, split: Split, temperatures: Mapping[Path, float]) -> dict[Path, Both]:
    labels = split.labels.numpy()
    return {path: _both(logits, labels, temperatures[path]) for path, logits in _logits(family, split, temperatures)}


def _logits(family: Family, split: Split, paths: Iterable[Path]) -> Iterator[tuple[Path, NDArray[np.float32]]]:
    return ((path, logits.float().numpy()) for path, logits in path_logits(family, split.x, paths))


def _both(logits: NDArray[np.float32], labels: NDArray[np.int64], temperature: float) -> Both:
    return answers(logits, labels), answers(logits, labels, temperature)


def _metrics(path: Both, reference: Both, split: Split, classes: int) -> SplitMetrics:
    plain, scaled = (measure(*pair) for pair in zip(path, reference, strict=True))
    return SplitMetrics(
        accuracy=plain.accuracy,
        agreement=plain.agreement,
        loss=plain.loss,
        calibration_error=plain.calibration_error,
        scaled_loss=scaled.loss,
        scaled_calibration_error=scaled.calibration_error,
        balanced_accuracy=score_classes(path[0].answer, split.labels.numpy(), classes).balanced_accuracy,
    )
