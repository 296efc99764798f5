"""How long a part of a path takes on this machine: measured at warm-up, answered as a quantile, not a mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from family.tree import Path

QUANTILE = 0.9
_LEAST_RUNS, _MOST_RUNS, _CELL_S = 5, 30, 0.015


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a path in one run, with the head read at its end: `nodes`, and whether it starts at the input."""

    nodes: Path
    embed: bool


@dataclass(frozen=True, slots=True)
class LatencyProfile:
    """Seconds of (segment, batch size), for the segments that the policy can ask for."""

    cells: Mapping[tuple[Segment, int], float]
    batches: tuple[int, ...]  # rising

    def latency_s(self, segment: Segment, rows: int) -> float:
        """The measured quantile for the next larger profiled batch; beyond the largest, as many of those as needed.

        Raises:
            KeyError: the segment was not profiled.
        """
        for batch in self.batches:
            if rows <= batch:
                return self.cells[segment, batch]
        largest = self.batches[-1]
        return self.cells[segment, largest] * -(-rows // largest)


def measure_profile(
    run: Callable[[Segment, int], object],
    segments: Iterable[Segment],
    max_batch: int,
    clock: Callable[[], float],
    stop: Callable[[], bool] = lambda: False,
) -> LatencyProfile | None:
    """Time every segment at batch sizes 1, 4, 16, ... and `max_batch`; none if `stop` said so in between.

    `run(segment, rows)` does one inference. Each cell takes its first run as warm-up and then repeats for at least
    5 runs and 15 ms.
    """
    batches = tuple(sorted({max_batch, *(4**k for k in range(16) if 4**k < max_batch)}))
    cells = {}
    for segment in segments:
        for batch in batches:
            if stop():
                return None
            run(segment, batch)
            times: list[float] = []
            while len(times) < _LEAST_RUNS or (sum(times) < _CELL_S and len(times) < _MOST_RUNS):
                start = clock()
                run(segment, batch)
                times.append(clock() - start)
            cells[segment, batch] = float(np.quantile(times, QUANTILE))
    return LatencyProfile(cells, batches)
