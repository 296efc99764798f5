from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.calibrate import answers, calibration_error, cross_entropy, fit_temperature, measure, reliability


@given(st.floats(0.3, 5.0), st.integers(0, 1000))
@settings(max_examples=25)
def test_temperature_of_a_known_population_is_found(temperature: float, seed: int) -> None:
    """Labels drawn from softmax(logits / T): T is what the fit has to find."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(20_000, 5))
    scaled = np.exp(logits / temperature)
    shares = (scaled / scaled.sum(axis=1, keepdims=True)).cumsum(axis=1)
    labels = (rng.random((len(logits), 1)) > shares).sum(axis=1).clip(max=4)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.15)


def test_temperature_never_makes_the_fitted_loss_worse() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(500, 10)) * 4, rng.integers(0, 10, 500)
    assert cross_entropy(logits / fit_temperature(logits, labels), labels) <= cross_entropy(logits, labels)


def test_rows_that_are_all_answered_right_say_nothing_of_the_temperature() -> None:
    """Bug found: the fit went towards e**-3, and wrong answers on test data had confidences of 1."""
    logits, labels = np.array([[2.0, 0, 0], [0, 1, 0], [0, 0, 3]]), np.arange(3)
    assert fit_temperature(logits, labels) == 1
    assert fit_temperature(np.vstack([logits, [[0.1, 0, 0]]]), np.array([0, 1, 2, 1])) != 1


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    correct = np.array([True, True, True, False, True, False])
    # bins: four rows at 0.95, three right; two at 0.55, one right
    assert calibration_error(confidence, correct) == pytest.approx((4 * 0.20 + 2 * 0.05) / 6)
    assert calibration_error(np.ones(3), np.ones(3, bool)) == 0


def test_the_bins_of_a_reliability_diagram_make_up_the_calibration_error() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1.0, 500)
    correct = rng.random(500) < confidence**2
    means, accuracy, rows = reliability(confidence, correct)
    assert rows.sum() == 500
    assert (rows * np.abs(means - accuracy)).sum() / 500 == pytest.approx(calibration_error(confidence, correct))


def test_metrics_compare_with_the_reference() -> None:
    logits = np.array([[2.0, 0], [0, 2], [2, 0], [0, 2]])
    reference = np.array([[2.0, 0], [0, 2], [0, 2], [0, 2]])
    labels = np.array([0, 1, 1, 0])
    metrics = measure(answers(logits, labels), answers(reference, labels))
    assert (metrics.accuracy, metrics.agreement) == (0.5, 0.75)
