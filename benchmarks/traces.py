"""Arrival traces for load tests: when each request of a run arrives.

Every function returns rising arrival times (equal ones are possible), `(n,) float64` in seconds from 0, all below
`duration_s`. The number of arrivals is random, as it is in the process; the same seed gives the same trace. Rates are in
arrivals per second. What the requests hold, and who answers them, is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Arrivals = NDArray[np.float64]

_DAY_SLOTS = 1440
"""Slots of constant rate in a synthetic day, as there are minutes in a day."""


def poisson(rate: float, duration_s: float, seed: int) -> Arrivals:
    """A Poisson process: arrivals that know nothing of each other."""
    return bursts(rate, 1.0, duration_s, seed)


def bursts(rate: float, cv2: float, duration_s: float, seed: int) -> Arrivals:
    """A renewal process with gamma-distributed gaps of mean `1 / rate` and squared coefficient of variation `cv2`.

    `cv2` = 1 is a Poisson process, above 1 arrivals come in bursts, below 1 they are more regular. The first gap begins
    at 0, as if an arrival had just been there.
    """
    _require_positive(rate=rate, cv2=cv2, duration_s=duration_s)
    rng = np.random.default_rng(seed)

    def gaps(count: int) -> Arrivals:
        return rng.gamma(1 / cv2, cv2 / rate, count)

    return _renewals(gaps, rate * duration_s, cv2, duration_s)


def ramp(start_rate: float, end_rate: float, duration_s: float, seed: int) -> Arrivals:
    """A Poisson process whose rate goes linearly from `start_rate` to `end_rate`; either may be 0, and it may fall.

    By inversion: the arrivals of a Poisson process of rate 1 are taken back through the expected number of arrivals,
    `start_rate t + (end_rate - start_rate) t^2 / (2 duration_s)` (Çinlar, Introduction to Stochastic Processes, 1975).
    """
    _require_positive(duration_s=duration_s)
    if min(start_rate, end_rate) < 0 or not 0 < start_rate + end_rate < np.inf:
        raise ValueError(f"expected rates of at least 0 that are not both 0, got {start_rate:g} and {end_rate:g}")
    expected = (start_rate + end_rate) / 2 * duration_s
    count = poisson(1.0, expected, seed)  # in units of expected arrivals
    slope = (end_rate - start_rate) / duration_s
    # The root of the quadratic in the form that does not cancel, and holds for a slope of 0. At the end of a ramp down
    # to 0 the discriminant is 0, but for rounding.
    times = 2 * count / (start_rate + np.sqrt(np.maximum(start_rate**2 + 2 * slope * count, 0.0)))
    return times[times < duration_s]


def synthetic_day(rate: float, duration_s: float, seed: int) -> Arrivals:
    """A made-up day of mean rate `rate`, squeezed into `duration_s`. Synthetic: no real service was recorded.

    It has what published traces of services have (Shahrad et al., Serverless in the Wild, 2020): a day and a night, one
    sine whose peak is three times its trough; noise from minute to minute that is lognormal and lasts, an AR(1) of
    coefficient 0.9; and a few dozen flash crowds whose heights are Pareto-distributed, of infinite variance (index 1.5),
    cut at 20 times the mean, each fading by a factor e in 3 minutes. Within each minute arrivals are Poisson.
    """
    _require_positive(rate=rate, duration_s=duration_s)
    rng = np.random.default_rng(seed)
    minutes = np.arange(_DAY_SLOTS)
    level = 1 - 0.5 * np.cos(2 * np.pi * minutes / _DAY_SLOTS)
    noise = np.empty(_DAY_SLOTS)
    state = rng.normal(0, 0.3)
    for minute, shock in enumerate(rng.normal(0, 0.3 * np.sqrt(1 - 0.9**2), _DAY_SLOTS)):
        noise[minute] = state = 0.9 * state + shock
    level *= np.exp(noise)
    for start in rng.integers(0, _DAY_SLOTS, rng.poisson(36)):
        height = min(0.5 * (1 + rng.pareto(1.5)), 20.0)
        level[start:] += height * np.exp(-(minutes[start:] - start) / 3)
    return _by_slot(level, rate, duration_s, rng)


def _by_slot(level: Arrivals, rate: float, duration_s: float, rng: np.random.Generator) -> Arrivals:
    """A Poisson process whose rate is constant in each of the equal slots of `level (slots,)` and proportional to it,
    with the mean `rate`."""
    slot_s = duration_s / len(level)
    counts = rng.poisson(level / level.mean() * rate * slot_s)
    starts = np.repeat(np.arange(len(level)) * slot_s, counts)
    # Given their number, the arrivals of a Poisson process are uniform.
    times = np.sort(starts + rng.random(len(starts)) * slot_s)
    return times[times < duration_s]  # a sum may round up to the end


def _renewals(gaps: Callable[[int], Arrivals], expected: float, cv2: float, duration_s: float) -> Arrivals:
    """Sums of gaps up to `duration_s`, drawn in pieces that mostly suffice at once: `expected` and 4 deviations more."""
    piece = int(expected + 4 * np.sqrt(expected * max(cv2, 1.0))) + 16
    times = np.cumsum(gaps(piece))
    while times[-1] < duration_s:
        times = np.concatenate([times, times[-1] + np.cumsum(gaps(piece))])
    return times[times < duration_s]


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < np.inf:
            raise ValueError(f"{name}: expected a positive finite number, got {value:g}")
