"""What became of a trace's requests, as shares of *all* arrivals: the same for simulated and real servers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class Shares:
    """One element a request, in the order of their arrival.

    `depth (n,)`: blocks of the answer, 0 where there was none; `right (n,)`: whether it was right; `latency_s (n,)`: from
    the scheduled arrival.
    """

    budget_s: float
    depth: NDArray[np.int16]
    right: NDArray[np.bool_]
    latency_s: NDArray[np.float64]

    @property
    def in_time(self) -> NDArray[np.bool_]:
        """Answered within the budget, `(n,)`."""
        return np.asarray((self.depth > 0) & (self.latency_s <= self.budget_s))

    @property
    def attainment(self) -> float:
        """Share of all arrivals answered in time."""
        return float(self.in_time.mean())

    @property
    def goodput(self) -> float:
        """Share of all arrivals answered correctly and in time."""
        return float((self.in_time & self.right).mean())

    @property
    def accuracy(self) -> float:
        """Share of the answers in time that are right."""
        return float(self.right[self.in_time].mean()) if self.in_time.any() else 0.0

    @property
    def mean_depth(self) -> float:
        """Blocks of the answers in time."""
        return float(self.depth[self.in_time].mean()) if self.in_time.any() else 0.0
