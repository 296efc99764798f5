"""Batches that have to run, each by its time: how long may something else keep them waiting?"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

Due = tuple[float, float]
"""When a batch is due, and how long it takes."""


class Agenda:
    """Batches that run one after another, earliest due first."""

    __slots__ = ("_due_s", "_least_s", "_slack_s", "_until_s")

    def __init__(self, batches: Iterable[Due]) -> None:
        ordered = sorted(batches)
        self._due_s = [due_s for due_s, _ in ordered]
        self._until_s = [0.0, *accumulate(took_s for _, took_s in ordered)]  # the end of each, if the first began at 0
        self._slack_s = [due_s - end_s for due_s, end_s in zip(self._due_s, self._until_s[1:], strict=True)]
        self._least_s = [*accumulate(reversed(self._slack_s), min, initial=math.inf)]  # of the last 0, 1, 2 ... batches

    def spare_s(self, start_s: float, more: Sequence[Due] = ()) -> float:
        """How long the first may be kept waiting from `start_s` on, so that all are in time, and so are `more` batches,
        earliest due first, that run among these. Below zero if they cannot be in time."""
        spare_s, added_s, place, count = math.inf, start_s, 0, len(self._due_s)
        for due_s, took_s in more:
            if place < count and self._due_s[place] < due_s:
                before, place = place, bisect_left(self._due_s, due_s, place)
                spare_s = min(spare_s, min(self._slack_s[before:place]) - added_s)
            added_s += took_s
            slack_s = due_s - self._until_s[place] - added_s
            if slack_s < spare_s:  # `min` takes longer, and this is asked for very often
                spare_s = slack_s
        return min(spare_s, self._least_s[count - place] - added_s)
