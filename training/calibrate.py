"""Temperature scaling and calibration error (Guo et al. 2017, arXiv 1706.04599)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from family.manifest import Metrics

Logits = NDArray[np.floating]
Labels = NDArray[np.integer]

_BINS = 15
_LOG_TEMPERATURE_RANGE = (-3.0, 3.0)


def fit_temperature(logits: Logits, labels: Labels) -> float:
    """The temperature T that minimises the cross-entropy of `softmax(logits / T)`, within e**-3 .. e**3.

    1 where all rows are answered right: then any lower temperature fits them better still, and says nothing of other rows.

    `logits` is `(rows, classes)`, `labels` `(rows,)`.
    """
    if (logits.argmax(axis=1) == labels).all():
        return 1.0

    def loss(log_temperature: float) -> float:
        return cross_entropy(logits / np.exp(log_temperature), labels)

    found = minimize_scalar(loss, bounds=_LOG_TEMPERATURE_RANGE, method="bounded")
    return float(np.exp(found.x))


def cross_entropy(logits: Logits, labels: Labels) -> float:
    """Mean negative log-likelihood in nats a row."""
    rows = np.arange(len(labels))
    return float(-log_softmax(logits.astype(np.float64), axis=1)[rows, labels].mean())


def calibration_error(confidence: NDArray[np.floating], correct: NDArray[np.bool_]) -> float:
    """Expected calibration error over equal-width bins: |accuracy - confidence| of each, weighted by its rows.

    Both arrays are `(rows,)`.
    """
    gaps = np.bincount(_bins(confidence), weights=correct - confidence, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(confidence))


@dataclass(frozen=True, slots=True)
class Answers:
    """What a path says of each row, by `softmax(logits / temperature)`; all arrays are `(rows,)`.

    `answer` is the likeliest class and `confidence` its probability, 0..1; `correct`: it is the label. `loss` is the
    negative log-likelihood of the label, in nats.
    """

    answer: NDArray[np.intp]
    confidence: NDArray[np.float64]
    correct: NDArray[np.bool_]
    loss: NDArray[np.float64]


def answers(logits: Logits, labels: Labels, temperature: float = 1.0) -> Answers:
    """Read the answers off logits `(rows, classes)`, with labels `(rows,)`."""
    log_probabilities = log_softmax(logits.astype(np.float64) / temperature, axis=1)
    answer = logits.argmax(axis=1)
    return Answers(
        answer=answer,
        confidence=np.exp(log_probabilities.max(axis=1)),
        correct=answer == labels,
        loss=-log_probabilities[np.arange(len(labels)), labels],
    )


def reliability(
    confidence: NDArray[np.floating], correct: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Mean confidence, accuracy and number of rows of every bin that has rows: what `calibration_error` is made of."""
    bins = _bins(confidence)
    rows = np.bincount(bins, minlength=_BINS)
    filled = rows > 0
    means = [np.bincount(bins, weights=values, minlength=_BINS)[filled] / rows[filled] for values in (confidence, correct)]
    return means[0], means[1], rows[filled]


def measure(path: Answers, reference: Answers) -> Metrics:
    """A path's metrics on one split, where the reference path gave these answers."""
    return Metrics(
        accuracy=float(path.correct.mean()),
        loss=float(path.loss.mean()),
        agreement=float((path.answer == reference.answer).mean()),
        calibration_error=calibration_error(path.confidence, path.correct),
    )


def _bins(confidence: NDArray[np.floating]) -> NDArray[np.int64]:
    return np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
