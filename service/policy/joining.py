"""Rows on different paths that go to the same block next, in one batch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from itertools import islice

from service.policy.state import Row
from service.policy.waiting import Waiting
from service.profile import LatencyProfile, Segment


def join(
    rows: list[Row],
    segment: Segment,
    queues: Iterable[tuple[Segment, Waiting]],
    profile: LatencyProfile,
    start_s: float,
    limit_s: float,
    spare_s: float,
) -> tuple[list[Row], Segment]:
    """The batch of `rows` with those that go to the same block next, and how far it runs.

    Rows of `queues` (by what they run next) join, and leave their queue, as far as that makes none of the batch late,
    takes no longer than `limit_s`, and for the sake of deeper work no longer than `spare_s`. The batch runs as many of the
    blocks that all go to as fit into `limit_s`; at least one. `start_s` is now, and the time that sending takes.
    """
    latency_s, first, embed = profile.latency_s, segment.nodes[0], segment.embed
    whole, took_s = segment, latency_s(segment, len(rows))
    earliest_s = min([row.deadline_s for row in rows])
    if earliest_s < start_s + took_s:
        earliest_s = math.inf  # some are late anyway
    for other, queue in queues:
        if other.nodes[0] != first or other.embed != embed or not queue.items:
            continue
        room = profile.max_batch - len(rows)
        if room <= 0:
            break
        common, rest = _common(segment, other, whole)
        took_s = latency_s(common, len(rows) + min(room, len(queue.items)))
        rest_s = latency_s(rest, len(rows)) if rest.nodes else 0.0
        if took_s > limit_s or earliest_s < start_s + took_s + rest_s:
            continue
        if took_s > spare_s and queue.items[0].answered is not None:  # first answers have to run anyway
            continue
        in_time = (place for place, row in enumerate(queue.items) if row.deadline_s >= start_s + took_s)
        joining = queue.take_places(islice(in_time, room))
        if joining:
            segment = common
            rows = rows + joining
            earliest_s = min(earliest_s, min([row.deadline_s for row in joining]))
    return rows, _cut(rows, segment, whole, profile, start_s, limit_s)


def _cut(
    rows: list[Row], segment: Segment, whole: Segment, profile: LatencyProfile, start_s: float, limit_s: float
) -> Segment:
    """As much of `segment` as fits into `limit_s`, at least a block; more if a first answer would be late in two runs."""
    urgent_s = min((row.deadline_s for row in rows if row.answered is None), default=math.inf)
    while len(segment.nodes) > 1 and profile.latency_s(segment, len(rows)) > limit_s:
        shorter = Segment(segment.nodes[:-1], segment.embed)
        rest = Segment(whole.nodes[len(shorter.nodes) :], embed=False)
        in_two_s = profile.latency_s(shorter, len(rows)) + profile.latency_s(rest, len(rows))
        if start_s + profile.latency_s(segment, len(rows)) <= urgent_s < start_s + in_two_s:
            break
        segment = shorter
    return segment


@cache  # of parts of a model's paths
def _common(one: Segment, other: Segment, whole: Segment) -> tuple[Segment, Segment]:
    """The blocks that both begin with, and what `whole`, which begins with these, has to run after them."""
    count = 0
    for node, also in zip(one.nodes, other.nodes, strict=False):
        if node != also:
            break
        count += 1
    return Segment(one.nodes[:count], one.embed), Segment(whole.nodes[count:], embed=False)
