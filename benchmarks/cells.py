"""The situations that policies are compared in: named cells of an arrival process, a load and a deadline.

Loads are shares of C, the highest rate at which the shallowest static path with AIMD batching answers 99 % within the
longer deadline. Deadlines are multiples of the latency of the shallowest path at an idle server, end to end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks import traces
from benchmarks.traces import Arrivals

SHORT, LONG = 12, 30
"""Deadlines, in latencies of the shallowest path."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One situation: `load` is the mean, in C; a ramp goes up to `peak`; bursts have gaps of variation `cv2`."""

    kind: Literal["poisson", "bursts", "ramp", "synthetic day"]
    load: float
    deadline: int
    cv2: float = 1
    peak: float = 0

    @property
    def name(self) -> str:
        """For people."""
        what = {
            "poisson": f"Poisson, {self.load:g} C",
            "bursts": f"bursts CV² {self.cv2:g}, {self.load:g} C",
            "ramp": f"ramp 0.3 to {self.peak:g} C",
            "synthetic day": f"synthetic day, {self.load:g} C",
        }[self.kind]
        return f"{what}, {self.deadline} L"

    @property
    def bursty(self) -> bool:
        """Whether arrivals come in bursts."""
        return self.kind == "synthetic day" or self.cv2 > 1

    def arrivals(self, capacity: float, requests: int, seed: int) -> Arrivals:
        """A trace of about so many requests at a service of this capacity, requests a second."""
        rate = self.load * capacity
        seconds = requests / rate
        match self.kind:
            case "poisson":
                return traces.poisson(rate, seconds, seed)
            case "bursts":
                return traces.bursts(rate, self.cv2, seconds, seed)
            case "ramp":
                return traces.ramp(0.3 * capacity, self.peak * capacity, seconds, seed)
            case "synthetic day":
                return traces.synthetic_day(rate, seconds, seed)


def _ramp(peak: float, deadline: int) -> Cell:
    return Cell("ramp", (0.3 + peak) / 2, deadline, peak=peak)


LIVE: tuple[Cell, ...] = (
    Cell("poisson", 0.2, SHORT),
    Cell("poisson", 0.4, LONG),
    Cell("poisson", 0.7, SHORT),
    Cell("poisson", 0.9, LONG),
    Cell("poisson", 1.1, LONG),
    Cell("bursts", 0.2, SHORT, cv2=4),
    Cell("bursts", 0.4, LONG, cv2=4),
    Cell("bursts", 0.4, SHORT, cv2=8),
    Cell("bursts", 0.7, LONG, cv2=8),
    Cell("bursts", 0.9, LONG, cv2=8),
    _ramp(0.85, SHORT),
    Cell("synthetic day", 0.5, LONG),
)
"""The twelve that the real server is measured in."""

MATRIX: tuple[Cell, ...] = tuple(
    cell
    for deadline in (SHORT, LONG)
    for cell in (
        *(Cell("poisson", load, deadline) for load in (0.1, 0.2, 0.4, 0.7, 0.9, 1.1, 1.3)),
        *(Cell("bursts", load, deadline, cv2=cv2) for cv2 in (2, 4, 8) for load in (0.1, 0.2, 0.4, 0.7, 0.9, 1.1)),
        *(_ramp(peak, deadline) for peak in (0.6, 0.85, 0.98)),
    )
)
"""All that the simulator plays."""
