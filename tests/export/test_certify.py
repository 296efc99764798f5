from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from export.certify import DELTA, EPSILONS, THRESHOLDS, CertifiedLevel, certify, disagreements, exits


def test_rows_exit_where_they_are_confident_and_at_the_end_at_the_latest() -> None:
    confidences = np.array([[0.9, 0.5, 0.2], [0.1, 0.8, 0.3], [0.1, 0.1, 0.1]])
    assert exits(confidences, 0.8).tolist() == [0, 1, 2]
    assert exits(confidences, 0.0).tolist() == [0, 0, 0]
    assert exits(confidences, 1.1).tolist() == [2, 2, 2]


def test_disagreement_is_with_the_last_path_where_the_row_left() -> None:
    confidences = np.array([[0.9, 0.5, 0.9], [0.95, 0.8, 0.3], [0.1, 0.1, 0.1]])
    answers = np.array([[1, 2, 0], [3, 0, 0], [3, 0, 5]])
    # at 0.9 the first and third row leave at once, both wrong; the second goes to the end
    assert disagreements(confidences, answers, [1.1, 0.9, 0.5]).tolist() == [0, 2, 3]


def test_the_threshold_before_the_first_failure_is_certified_not_the_first_failure() -> None:
    """A published implementation returns the failing one. With n = 299 zero errors certify 0.01 at 0.05, one does not."""
    assert binom.cdf(0, 299, 0.01) <= 0.05 < binom.cdf(1, 299, 0.01)
    thresholds = (0.9, 0.8, 0.7, 0.6)
    counts = np.array([0, 0, 1, 0])  # what comes after a failure does not count
    assert certify(counts, 299, (0.01,), 0.05, thresholds) == (CertifiedLevel(0.01, 0.8),)
    assert certify(counts, 298, (0.01,), 0.05, thresholds) == ()
    assert certify(np.zeros(4, int), 299, (0.01,), 0.05, thresholds) == (CertifiedLevel(0.01, 0.6),)


def test_delta_is_divided_among_the_menu() -> None:
    counts = np.zeros(len(THRESHOLDS), int)
    n = 299  # enough for one level at 0.05, not for one at 0.05 / 5
    assert [level.epsilon for level in certify(counts, n)] == [0.02, 0.05, 0.1]


def test_the_grid_goes_from_strict_to_lax() -> None:
    assert list(THRESHOLDS) == sorted(set(THRESHOLDS), reverse=True)


def population(rng: np.random.Generator, rows: int, honesty: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a world: two exits and a reference. An exit of confidence c differs from the reference with
    probability (1 - c) * honesty, so that above 1 the confidences promise too much."""
    confidences = rng.beta(4, 1, size=(3, rows))
    confidences[1] = np.maximum(confidences[1], confidences[0])
    differs = rng.random((2, rows)) < (1 - confidences[:2]) * honesty
    answers = np.zeros((3, rows), int)
    answers[:2] = differs
    return confidences, answers


@pytest.mark.parametrize("honesty", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("n", [300, 500, 2000])
def test_the_certified_risk_holds_over_2000_draws(honesty: float, n: int) -> None:
    """True risks are those of a population of 100,000 rows; a draw is n of them. The share of draws in which *any*
    level is exceeded must not be significantly above delta (one-sided binomial test, 1 %)."""
    rng = np.random.default_rng(7)
    confidences, answers = population(rng, 100_000, honesty)
    rows = np.arange(answers.shape[1])
    per_row = np.array([(answers != answers[-1])[exits(confidences, t), rows] for t in THRESHOLDS])
    true_risk = dict(zip(THRESHOLDS, per_row.mean(axis=1), strict=True))
    draws, violations, certified = 2000, 0, 0
    for _ in range(draws):
        counts = per_row[:, rng.integers(0, per_row.shape[1], n)].sum(axis=1)
        levels = certify(counts, n)
        certified += len(levels)
        violations += any(true_risk[level.threshold] > level.epsilon for level in levels)
    assert binom.sf(violations - 1, draws, DELTA) > 0.01, f"{violations} of {draws}"
    assert certified > draws, "a certificate that is never given holds trivially"


def test_the_test_above_can_fail() -> None:
    """The same, with the published mistake: deploying the first threshold that fails."""
    rng = np.random.default_rng(7)
    confidences, answers = population(rng, 100_000, honesty=1.0)
    rows = np.arange(answers.shape[1])
    per_row = np.array([(answers != answers[-1])[exits(confidences, t), rows] for t in THRESHOLDS])
    violations = 0
    for _ in range(2000):
        counts = per_row[:, rng.integers(0, per_row.shape[1], 500)].sum(axis=1)
        first_failing = [int(np.argmax(binom.cdf(counts, 500, e) > DELTA / len(EPSILONS))) for e in EPSILONS]
        violations += any(per_row[j].mean() > e for j, e in zip(first_failing, EPSILONS, strict=True))
    assert binom.sf(violations - 1, 2000, DELTA) < 0.01
