from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from benchmarks.anytime import best_so_far, product, threshold_point

rungs = arrays(np.float64, (4, 5, 3), elements=st.floats(0.01, 1)).map(lambda each: each / each.sum(axis=2, keepdims=True))


@given(rungs)
def test_the_confidence_of_the_best_so_far_never_falls(probabilities) -> None:
    best = best_so_far(probabilities)
    assert (np.diff(best.max(axis=2), axis=0) >= 0).all()
    assert (best.max(axis=2) == np.maximum.accumulate(probabilities.max(axis=2), axis=0)).all()


@given(rungs)
def test_a_product_of_experts_is_the_normalised_product(probabilities) -> None:
    expected = np.cumprod(probabilities, axis=0)
    expected /= expected.sum(axis=2, keepdims=True)
    np.testing.assert_allclose(product(probabilities), expected, rtol=1e-6)


@given(rungs)
def test_a_threshold_of_zero_stops_at_once_and_above_one_never(probabilities) -> None:
    labels = np.zeros(5, np.int64)
    costs = np.array([1.0, 2.0, 3.0, 7.0])
    first, last = ((probabilities[rung].argmax(axis=1) == 0).mean() for rung in (0, -1))
    assert threshold_point(probabilities, costs, labels, 0.0) == (1.0, first)
    assert threshold_point(probabilities, costs, labels, 1.1) == (7.0, last)
