"""How long a part of a path takes on this machine: measured at warm-up, corrected by every run, told as a quantile.

A run is a call, perhaps the embedding, some blocks, and the head: these parts are timed (medians, at several batch
sizes) and added up. What the inference thread really takes is told in relation to that sum, by the 0.95 quantile of the
ratios of the latest runs of about the same batch size; a size that has not been run for some time learns of the others'
ratios, as nobody would run a batch again that was once found slow. What a run waits for beside, until the thread begins
and until the event loop hears of its end, does not depend on the run and is added: the 0.95 quantile of the latest
runs, too. So a processor that somebody else wants as well shows after a few runs, and is forgotten as fast.

What sending an answer takes is kept back from every budget, the 0.99 quantile. A request waits for a busy event loop as a
run's end does, but nobody can tell for how long: when it is read, it begins to exist. So the 0.99 quantile of these waits
is kept back as well from what is not a must.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from family.tree import Path

QUANTILE = 0.95
KEPT_BACK_QUANTILE = 0.99
_WINDOW = 50
_LEAST_RUNS, _MOST_RUNS, _CELL_S = 5, 30, 0.01


class Segment(NamedTuple):
    """A part of a path in one run: `nodes` (may be none), and whether it starts at the input, with the embedding."""

    nodes: Path
    embed: bool


class Parts(BaseModel):
    """Median seconds of the parts of a run at each of the rising batch sizes `batches`; all rows of a tuple per size.

    `embed`, `head` and each of `nodes` are what the part adds to the `call`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    batches: tuple[int, ...] = Field(min_length=1)
    call: tuple[float, ...]
    embed: tuple[float, ...]
    head: tuple[float, ...]
    nodes: dict[int, tuple[float, ...]]

    @model_validator(mode="after")
    def _is_a_table(self) -> Parts:
        if self.batches[0] != 1 or list(self.batches) != sorted(set(self.batches)):
            raise ValueError(f"expected rising batch sizes from 1, got {list(self.batches)}")
        for column in (self.call, self.embed, self.head, *self.nodes.values()):
            if len(column) != len(self.batches) or min(column) < 0:
                raise ValueError("expected a time, not negative, for every batch size")
        return self


class LatencyProfile:
    """Predicts the seconds of a run, and learns from what runs took."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.max_batch = parts.batches[-1]
        self._typical: dict[Segment, list[float]] = {}
        self._ratios = [_Window(QUANTILE) for _ in range(self.max_batch.bit_length() + 1)]
        self._waits = _Window(QUANTILE, quantile=0.0)
        self._lags = _Window(KEPT_BACK_QUANTILE, quantile=0.0)  # the same values
        self._sends = _Window(KEPT_BACK_QUANTILE, size=200, quantile=0.0)

    def typical_s(self, segment: Segment, rows: int) -> float:
        """The median at warm-up, between batch sizes interpolated; beyond the largest, as many of those as needed.

        Raises:
            KeyError: the segment has a block that was not timed.
        """
        table = self._table(segment)
        if rows <= self.max_batch:
            return table[rows]
        whole, rest = divmod(rows, self.max_batch)
        return whole * table[self.max_batch] + table[rest]

    def latency_s(self, segment: Segment, rows: int) -> float:
        """The 0.95 quantile as of late: what to count on."""
        if rows > self.max_batch:
            runs = -(-rows // self.max_batch)
            return self.typical_s(segment, rows) * self.ratio(rows) + runs * self._waits.quantile
        table = self._typical.get(segment) or self._table(segment)  # asked for very often
        return table[rows] * self._ratios[rows.bit_length()].quantile + self._waits.quantile

    def pace(self, rows: int) -> tuple[float, float]:
        """What makes `latency_s` of so many rows, at most the largest batch, out of `typical_s`: times the first, plus the
        second."""
        return self._ratios[rows.bit_length()].quantile, self._waits.quantile

    def likely_s(self, segment: Segment, rows: int) -> float:
        """The median as of late, of at most the largest batch."""
        table = self._typical.get(segment) or self._table(segment)
        return table[rows] * self._ratios[rows.bit_length()].median + self._waits.median

    def latencies_s(self, segment: Segment, most: int) -> list[float]:
        """`latency_s` by number of rows, 0 to `most`, which is at most the largest batch."""
        windows, wait_s = self._ratios, self._waits.quantile
        return [
            took_s * windows[rows.bit_length()].quantile + wait_s
            for rows, took_s in enumerate(self._table(segment)[: most + 1])
        ]

    def most_rows(self, segment: Segment, limit_s: float) -> int:
        """The largest of the timed batches that takes no longer than `limit_s`; 0 if none does."""
        sizes = reversed(self.parts.batches)
        return next((rows for rows in sizes if self.latency_s(segment, rows) <= limit_s), 0)

    def observe(self, segment: Segment, rows: int, took_s: float, waited_s: float | None = None) -> None:
        """Learn that a run took the inference thread so long and, if that is known, what it waited beside."""
        expected_s = self.typical_s(segment, rows)
        if expected_s > 0:
            self._learn(rows, took_s / expected_s)
        if waited_s is not None:
            self._waits.add(waited_s)
            self._lags.add(waited_s)

    def _learn(self, rows: int, ratio: float) -> None:
        of_size = self._window(rows)
        for window in self._ratios:
            window.runs_without = 0 if window is of_size else window.runs_without + 1
            if window is of_size or window.runs_without > _WINDOW:
                window.add(ratio)

    @property
    def lag_s(self) -> float:
        """How long a request waits, as of late, until the event loop reads it: the 0.99 quantile of what runs wait for."""
        return self._lags.quantile

    @property
    def send_s(self) -> float:
        """What it takes as of late from the decision that an answer is final to handing the response over: the 0.99
        quantile. On a busy machine that is more than the work: everybody waits for a processor."""
        return self._sends.quantile

    @property
    def likely_send_s(self) -> float:
        """The median of that."""
        return self._sends.median

    def observe_send(self, took_s: float) -> None:
        """Learn that sending an answer took so long."""
        self._sends.add(took_s)

    def relax(self) -> None:
        """Expect a little less: for when nothing is run because too much is expected, and so nothing is learned."""
        for window in (*self._ratios, self._waits, self._lags, self._sends):
            window.relax()

    def ratio(self, rows: int) -> float:
        """By how much runs of about so many rows exceed their typical time, as a quantile."""
        return self._window(rows).quantile

    def _window(self, rows: int) -> _Window:
        return self._ratios[min(rows, self.max_batch).bit_length()]

    def _table(self, segment: Segment) -> list[float]:
        """Seconds by number of rows, 0 to the largest batch."""
        table = self._typical.get(segment)
        if table is None:
            parts = self.parts
            columns = [parts.call, parts.head, *(parts.nodes[node] for node in segment.nodes)]
            if segment.embed:
                columns.append(parts.embed)
            at_batches = np.sum(columns, axis=0)
            table = [0.0, *np.interp(np.arange(1, self.max_batch + 1), parts.batches, at_batches).tolist()]
            self._typical[segment] = table
        return table


class _Window:
    """The latest values, a quantile of them and their median; before there are any, what it began with. `runs_without`: how
    many runs there were since the latest that it is about."""

    def __init__(self, share: float, size: int = _WINDOW, quantile: float = 1.0) -> None:
        self._share = share
        self._size = size
        self._initial = quantile
        self.runs_without = 0
        self._latest: deque[float] = deque()
        self._sorted: list[float] = []
        self.quantile = self.median = quantile

    def add(self, value: float) -> None:
        if len(self._latest) == self._size:
            del self._sorted[bisect_left(self._sorted, self._latest.popleft())]
        self._latest.append(value)
        insort(self._sorted, value)
        self._set_quantile()

    def relax(self) -> None:
        """Forget the largest value; after the last it is as in the beginning."""
        if self._sorted:
            self._latest.remove(self._sorted.pop())
            self._set_quantile()

    def _set_quantile(self) -> None:
        """Of few values not the largest."""
        latest = self._sorted
        self.quantile = latest[int(self._share * (len(latest) - 1))] if latest else self._initial
        self.median = latest[len(latest) // 2] if latest else self._initial


Run = Callable[[Segment, int, bool], object]
"""Does one inference of (segment, rows, whether the head is read)."""


def measure_parts(
    run: Run, nodes: Iterable[int], max_batch: int, clock: Callable[[], float], stop: Callable[[], bool] = lambda: False
) -> Parts | None:
    """Time the parts of a run at batch sizes 1, 2, 4, ... and `max_batch`; none if `stop` said so in between.

    Each cell takes its first run as warm-up and then repeats for at least 5 runs and 10 ms.
    """
    batches = tuple(sorted({max_batch, *(2**k for k in range(16) if 2**k < max_batch)}))

    def column(segment: Segment, predict: bool) -> list[float]:
        return [_median_s(run, segment, rows, predict, clock) for rows in batches if not stop()]

    call = column(Segment((), False), False)
    embed = column(Segment((), True), False)
    head = column(Segment((), False), True)
    blocks = {node: column(Segment((node,), False), False) for node in nodes}
    if stop():
        return None

    def added(times: list[float]) -> tuple[float, ...]:
        return tuple(max(0.0, time - base) for time, base in zip(times, call, strict=True))

    return Parts(
        batches=batches,
        call=tuple(call),
        embed=added(embed),
        head=added(head),
        nodes={node: added(times) for node, times in blocks.items()},
    )


def warm_up_profile(
    profile: LatencyProfile,
    run: Run,
    segments: Iterable[Segment],
    clock: Callable[[], float],
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Let `profile` learn from some runs of whole segments at every batch size, until `stop` says so."""
    for segment in segments:
        for rows in profile.parts.batches:
            for _ in range(_LEAST_RUNS):
                if stop():
                    return
                start = clock()
                run(segment, rows, True)
                profile.observe(segment, rows, clock() - start)


def _median_s(run: Run, segment: Segment, rows: int, predict: bool, clock: Callable[[], float]) -> float:
    run(segment, rows, predict)
    times: list[float] = []
    while len(times) < _LEAST_RUNS or (sum(times) < _CELL_S and len(times) < _MOST_RUNS):
        start = clock()
        run(segment, rows, predict)
        times.append(clock() - start)
    return float(np.median(times))
