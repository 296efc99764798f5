"""About the most that is possible: with all arrivals and latencies known beforehand, but confidence only by running.

A relaxation in three steps, the first and the third in favour of the bound. The second is not exhaustive (rules that branch
on confidence, or use more than three answers, reach up to half a point more on the family of the benchmarks), and images
and jitter are drawn: so this is an estimate in expectation, not a proof.

1.  *Time is a fluid.* Rows run alone at the per-row cost of the most efficient batch, and can be stopped at any moment.
2.  *Confidence is used well.* The value of spending t seconds on an average row, `V(t)`, is the concave
    hull of what threshold rules along any sequence of the offered answers reach, thresholds chosen on the very inputs
    that are played. `V(0) = 0`, and on the way to the first answer it is linear, as if rows could be dropped at will.
3.  *Every row may use its whole window* from its arrival to its deadline. With equal budgets, arrivals and deadlines are
    in the same order, so rows can be served first come, first served: the k-th ends at `e_k`, with
    `a_(k+1) <= e_k <= d_k` (an earlier end only wastes time), and the sum of `V(e_k - e_(k-1))` is greatest for the taut
    string through that tube, whatever the concave V.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulation import Outcomes
from family.tree import Path
from service.policy.state import segment_between
from service.profile import LatencyProfile

Floats = NDArray[np.float64]

_THRESHOLDS = 24


def value_of_time(outcomes: Outcomes, profile: LatencyProfile) -> tuple[Floats, Floats]:
    """The corners `(seconds, expected right answers)` of V, from (0, 0) on; beyond the last it is constant."""
    paths = sorted(outcomes.right, key=len)
    confidence = {path: np.array(outcomes.confidence[path]) for path in paths}
    right = {path: np.array(outcomes.right[path], np.float64) for path in paths}
    points = {(0.0, 0.0)}
    for count in (1, 2, 3):
        for sequence in itertools.combinations(paths, count):
            costs = [_cost_s(profile, before, path) for before, path in itertools.pairwise(((), *sequence))]
            grids = [np.quantile(confidence[path], np.linspace(0, 1, _THRESHOLDS)) for path in sequence[:-1]]
            for thresholds in itertools.product(*grids):
                points.add(_threshold_rule(sequence, costs, thresholds, confidence, right))
    return _concave_hull(np.array(sorted(points)))


def _cost_s(profile: LatencyProfile, before: Path, path: Path) -> float:
    segment = segment_between(before, path)
    return min(profile.typical_s(segment, rows) / rows for rows in profile.parts.batches)


def _threshold_rule(
    sequence: Sequence[Path],
    costs: Sequence[float],
    thresholds: Sequence[float],
    confidence: dict[Path, Floats],
    right: dict[Path, Floats],
) -> tuple[float, float]:
    """The mean cost and correctness of rows that go along `sequence` until they are confident."""
    going = np.ones(len(right[sequence[0]]), np.bool_)
    answer = right[sequence[0]]
    spent = 0.0
    for place, (path, cost) in enumerate(zip(sequence, costs, strict=True)):
        spent += cost * float(going.mean())
        answer = np.where(going, right[path], answer)
        if place < len(thresholds):
            going = going & (confidence[path] < thresholds[place])
    return spent, float(answer.mean())


def _concave_hull(points: Floats) -> tuple[Floats, Floats]:
    """The upper left hull of points sorted by their first coordinate, as far as it rises."""
    hull: list[tuple[float, float]] = []
    for x, y in points.tolist():
        while len(hull) >= 2:
            (x1, y1), (x2, y2) = hull[-2:]
            if (y2 - y1) * (x - x1) > (y - y1) * (x2 - x1):
                break
            hull.pop()
        if not hull or y > hull[-1][1]:
            hull.append((x, y))
    xs, ys = zip(*hull, strict=True)
    return np.array(xs), np.array(ys)


def upper_bound(arrivals_s: Floats, budget_s: float, seconds: Floats, value: Floats) -> float:
    """About the share of arrivals that can be answered correctly and in time, at the most, by one server, where time has
    this value (`value_of_time`)."""
    pauses = np.flatnonzero(np.diff(arrivals_s) > budget_s) + 1  # after these everything begins anew
    right = 0.0
    for rows in np.split(arrivals_s, pauses):
        ends = taut_string(np.append(rows[1:], -np.inf), rows + budget_s, float(rows[0]))
        right += float(np.interp(np.diff(ends, prepend=rows[0]), seconds, value).sum())
    return right / len(arrivals_s)


def taut_string(lower: Floats, upper: Floats, start: float) -> Floats:
    """The shortest path from `(0, start)` through `lower[k] <= e[k] <= upper[k]`, which ends at the last upper bound: it
    maximises the sum of every concave function of the steps. All bounds are `(n,)` and rising.

    The funnel of straight lines that fit is followed until it closes; there the string bends. O(n) bends of O(n) steps at
    worst, and close to O(n) in all where the tube is narrow.
    """
    count = len(upper)
    lower = lower.copy()
    lower[-1] = upper[-1]
    ends = np.empty(count)
    done, level = 0, start
    while done < count:
        steepest, flattest = np.inf, -np.inf
        bend_low = bend_high = done
        place = done
        while place < count:
            steps = place - done + 1
            high, low = (upper[place] - level) / steps, (lower[place] - level) / steps
            if high < flattest:  # the lower side holds it back from here: bend at the last lower corner
                place, slope = bend_low, flattest
                break
            if low > steepest:
                place, slope = bend_high, steepest
                break
            if high <= steepest:
                steepest, bend_high = high, place
            if low >= flattest:
                flattest, bend_low = low, place
            place += 1
        else:
            place, slope = count - 1, (upper[-1] - level) / (count - done)
        ends[done : place + 1] = level + slope * np.arange(1, place - done + 2)
        level = ends[place]
        done = place + 1
    return ends
