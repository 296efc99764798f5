"""Rows without any answer that go in one run to a deeper path than the shallowest, rather than rung by rung."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

from family.tree import Path, extends
from service.policy.price import COIN
from service.policy.state import Offer, Row, segment_between
from service.profile import Segment


def straight(
    offer: Offer, per_second: float, rows: Sequence[Row], now_s: float, limit_s: float, *, alone: bool
) -> Path | None:
    """The path that all `rows` are to go to in one run of at most `limit_s`, if any.

    If they are alone, nobody else needs the device: the reference path. Else the deepest that is worth its time at the
    price `per_second`, and that they reach sooner so than by one run for their first answers and another for those that
    are unsure then: of few rows, a run costs more than their blocks.
    """
    if any(row.wish.path is not None or row.wish.exit_at is not None or row.at for row in rows):
        return None  # these are to be answered on the way, or are on it
    count, first, latency_s = len(rows), offer.climb[0], offer.profile.latency_s
    limit_s = min(limit_s, min(row.deadline_s for row in rows) - offer.careful_reserve_s - now_s)
    if alone and latency_s(Segment(offer.reference, embed=True), count) <= limit_s:
        return offer.reference
    unsure = math.ceil(count * min(1.0, (1 - offer.accuracies[first]) / COIN))
    first_s = latency_s(Segment(first, embed=True), count)
    best: Path | None = None
    for path in _on_the_way(offer.climb):
        took_s = latency_s(Segment(path, embed=True), count)
        in_two_s = first_s + latency_s(segment_between(first, path), unsure)
        gain = count * (offer.accuracies[path] - offer.accuracies[first])
        if took_s <= min(limit_s, in_two_s) and gain > per_second * (took_s - first_s):
            best = path
    return best


@cache
def _on_the_way(climb: tuple[Path, ...]) -> tuple[Path, ...]:
    """The paths after the first that lead to all that the first leads to: who goes there starts nothing again for it."""
    first = climb[0]
    return tuple(
        path
        for place, path in enumerate(climb[1:], start=1)
        if all(extends(later, path) for later in climb[place + 1 :] if extends(later, first))
    )
