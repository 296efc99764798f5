"""Certified early exits: Learn then Test with a fixed sequence (Angelopoulos et al. 2021, arXiv 2110.01052).

A row climbs the fixed sequence of paths and exits at the first whose calibrated confidence reaches a threshold, else
at the reference path. The risk of a threshold is the probability that the answer so given differs from the reference
path's; no labels are needed. (Logits here are torch's; those that the service computes are verified to be the same to
1e-4, so a row exactly at a threshold may leave elsewhere.) For each epsilon of a menu a threshold is found with

    P(risk <= epsilon) >= 1 - delta,

where the probability is over the draw of the certification data. It is marginal, over rows like those (i.i.d.).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

THRESHOLDS = (
    0.9999,
    0.9995,
    0.999,
    0.998,
    0.995,
    0.99,
    0.985,
    0.98,
    0.97,
    0.96,
    0.95,
    *(x / 100 for x in range(93, -1, -2)),
)
"""From strict to lax, fixed before any certification data is looked at."""

EPSILONS = (0.005, 0.01, 0.02, 0.05, 0.1)
"""The menu of risk levels."""

DELTA = 0.05
"""The probability that any of the certified levels is wrong: each level of the menu has an equal share of it."""


@dataclass(frozen=True, slots=True)
class CertifiedLevel:
    """At `threshold` the risk is at most `epsilon`, with the confidence that the certificate states."""

    epsilon: float
    threshold: float


def exits(confidences: NDArray[np.floating], threshold: float) -> NDArray[np.intp]:
    """Where each row leaves the sequence: `confidences (paths, rows)` -> indices `(rows,)`; the last path takes all."""
    confident = confidences >= threshold
    confident[-1] = True
    index: NDArray[np.intp] = confident.argmax(axis=0)
    return index


def disagreements(
    confidences: NDArray[np.floating], answers: NDArray[np.integer], thresholds: Sequence[float] = THRESHOLDS
) -> NDArray[np.intp]:
    """For each threshold, how many rows get another answer than the last path's.

    `confidences` and `answers` are `(paths, rows)`, in the order of the sequence.
    """
    rows = np.arange(answers.shape[1])
    differs = answers != answers[-1]
    return np.array([differs[exits(confidences, threshold), rows].sum() for threshold in thresholds])


def certify(
    counts: NDArray[np.integer],
    n: int,
    epsilons: Sequence[float] = EPSILONS,
    delta: float = DELTA,
    thresholds: Sequence[float] = THRESHOLDS,
) -> tuple[CertifiedLevel, ...]:
    """The laxest certified threshold for each epsilon; an epsilon for which there is none is left out.

    `counts` are the disagreements at `thresholds` among `n` rows. Each threshold is tested by the exact binomial
    p-value of "risk > epsilon". The thresholds are tested in their fixed order, each at the full level, up to the first
    that fails; the one *before* it is certified, so no correction for their number is needed. Over the menu of epsilons
    `delta` is divided equally (Bonferroni).
    """
    levels = []
    for epsilon in epsilons:
        p_values = binom.cdf(counts, n, epsilon)
        failed = np.flatnonzero(p_values > delta / len(epsilons))
        passed = int(failed[0]) if len(failed) else len(thresholds)
        if passed:
            levels.append(CertifiedLevel(epsilon, thresholds[passed - 1]))
    return tuple(levels)
