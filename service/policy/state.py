"""What every policy speaks of: rows that wait, the offer they can choose from, batches, decisions.

A policy is a deterministic state machine. In: rows that arrive, batches that finished, rows that leave, the time. Out:
which rows run next, through which blocks, and which are answered now. It knows no clock, asyncio or runtime, so that
the same code runs behind the engine and in a simulator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple, Protocol, TypeAlias

from family.choice import climb, pareto_front
from family.manifest import Manifest
from family.tree import Path, extends
from service.policy.queues import Key, SortedQueue
from service.policy.wish import StoppedBy, Wish
from service.profile import LatencyProfile, Segment


@dataclass(frozen=True, slots=True)
class Offer:
    """What a policy knows of a model.

    Attributes:
        climb: where rows are answered that go deeper, shallowest first; it ends at the reference path.
        front: the paths worth running whole, shallowest first; it ends at the reference path, too.
        accuracies: of all offered paths, on validation data.
        profile: how long segments take here.
        least_reserve_s: time kept back from every budget, at the least, to build and send the answer.
    """

    climb: tuple[Path, ...]
    front: tuple[Path, ...]
    accuracies: Mapping[Path, float]
    profile: LatencyProfile
    least_reserve_s: float = 0.0

    @staticmethod
    def of(manifest: Manifest, profile: LatencyProfile, reserve_s: float, min_depth: int = 1) -> Offer:
        """What `manifest` offers of at least `min_depth` blocks.

        Raises:
            ValueError: that is nothing.
        """
        accuracies = {path: accuracy for path, accuracy in manifest.accuracies.items() if len(path) >= min_depth}
        tree = manifest.tree
        return Offer(climb(tree, accuracies), pareto_front(tree, accuracies), accuracies, profile, reserve_s)

    @property
    def reserve_s(self) -> float:
        """Time kept back from every budget: what sending answers takes as of late, if that is more than the least."""
        return max(self.least_reserve_s, self.profile.send_s)

    @property
    def likely_reserve_s(self) -> float:
        """The median of that. For what is late already if it takes longer."""
        return max(self.least_reserve_s, self.profile.likely_send_s)

    @property
    def careful_reserve_s(self) -> float:
        """The same, and what requests wait for as of late before anybody sees them. For what is not a must: a request
        that is nearly too late is answered all the same."""
        return self.reserve_s + self.profile.lag_s

    @property
    def reference(self) -> Path:
        """The best path."""
        return self.front[-1]

    def after(self, path: Path) -> Path | None:
        """The next path of the climb after the answer of `path`; none if there is nothing better."""
        if path == self.reference or path not in self.climb:
            return None
        return self.climb[self.climb.index(path) + 1]

    def in_pieces_s(self, segment: Segment, longest_s: float) -> float:
        """Seconds that a row takes through `segment` in runs of at most `longest_s` each, or of a block."""
        whole_s, blocks = self.profile.latency_s(segment, 1), len(segment.nodes)
        if whole_s <= longest_s or blocks < 2:
            return whole_s
        call_s = self.profile.latency_s(Segment((), embed=False), 1)
        blocks_per_run = max(1, int(blocks * (longest_s - call_s) / (whole_s - call_s))) if whole_s > call_s else blocks
        return whole_s + (math.ceil(blocks / blocks_per_run) - 1) * call_s

    def gain(self, answered: Path, target: Path, confidence: float) -> float:
        """What the answer of `target` is expected to add to the probability of a right one.

        A row that `answered` with this calibrated confidence is wrong with probability `1 - confidence`; the share of
        such rows that `target` puts right is what it does on average, which makes the mean over all rows exact.
        """
        wrong = 1 - self.accuracies[answered]
        return (1 - confidence) * (self.accuracies[target] - self.accuracies[answered]) / wrong if wrong > 0 else 0.0


@cache  # of two paths of a model; asked for very often
def segment_between(before: Path, target: Path) -> Segment:
    """What has to run to get from the state after the blocks `before` (none: the input) to the answer of `target`.

    Where `target` extends `before` only the further blocks; else it starts again from the input.
    """
    if before and extends(target, before):
        return Segment(target[len(before) :], embed=False)
    return Segment(target, embed=True)


Place: TypeAlias = "tuple[SortedQueue[Row], Key]"


@dataclass(slots=True, eq=False)
class Row:
    """One input that waits or runs. Who uses a policy makes these (of a class of their own, if they need more fields)
    with the first three; the rest is the policy's.

    Attributes:
        at: the blocks that its state has been through since the input.
        answered: the path of its latest answer, which has this `confidence`.
        target: the path that it is on the way to.
        place: the queue where it waits, and its key there; none while it runs.
        deadline_s: when its budget ends; infinity without one.
    """

    wish: Wish
    arrived_s: float
    order: int
    at: Path = ()
    answered: Path | None = None
    confidence: float = 0.0
    target: Path = ()
    place: Place | None = None
    gone: bool = False
    deadline_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.deadline_s = math.inf if self.wish.deadline_s is None else self.wish.deadline_s

    @property
    def patient_until_s(self) -> float:
        """Until when it waits behind rows that have a budget."""
        return self.arrived_s + self.wish.patience_s

    @property
    def urgency(self) -> tuple[float, int, int]:
        """A sort key: earliest deadline first, then Triton's priority (1 highest, 0 none given), then who came first.
        Without a budget its patience counts."""
        deadline_s = self.patient_until_s if self.wish.deadline_s is None else self.wish.deadline_s
        return deadline_s, self.wish.priority or 2**31, self.order

    @property
    def rest(self) -> Segment:
        """What it has to run to get to its target."""
        return segment_between(self.at, self.target)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that run the same segment in one call.

    `predict`: some of them are at their target then; `keep_state`: some may go on from there; `expected_s`: how long
    the profile says that it takes.
    """

    rows: Sequence[Row]
    segment: Segment
    predict: bool
    keep_state: bool
    expected_s: float

    @staticmethod
    def of(rows: Sequence[Row], segment: Segment, offer: Offer) -> Batch:
        """A batch of these rows, of which each has `segment` as the beginning of its rest."""
        ending = [row for row in rows if row.rest == segment]
        predict, keep_state = bool(ending), len(ending) < len(rows)
        if not keep_state:
            going_on = _with_longer_ones(offer.climb)
            keep_state = any(row.target in going_on and row.wish.path is None for row in ending)
        return Batch(rows, segment, predict, keep_state, offer.profile.latency_s(segment, len(rows)))


@cache
def _with_longer_ones(paths: tuple[Path, ...]) -> frozenset[Path]:
    """Those that others of them begin with."""
    return frozenset(path for path in paths if any(extends(longer, path) for longer in paths if longer != path))


@dataclass(slots=True)
class Decision:
    """What to do now.

    Attributes:
        batch: what to run, if anything.
        done: rows whose latest answer is final, and why it has its depth.
        expired: rows that will not run: their budget ended before any block had run.
        refused: strict rows that cannot be answered in time any more.
    """

    batch: Batch | None = None
    done: list[tuple[Row, StoppedBy]] = field(default_factory=list)
    expired: list[Row] = field(default_factory=list)
    refused: list[Row] = field(default_factory=list)


class Step(NamedTuple):
    """An answer of `path` that is expected at `by_s`."""

    path: Path
    by_s: float


class Policy(Protocol):
    """Decides for the rows of one model."""

    def arrive(self, row: Row, now_s: float) -> None:
        """A row joins those that wait."""
        ...

    def finished(self, batch: Batch, confidences: Sequence[float], now_s: float) -> None:
        """A batch of this policy has run; the calibrated confidence of each row's answer there."""
        ...

    def leave(self, row: Row) -> None:
        """The row's client has gone: it costs no further compute, and no decision tells of it."""
        ...

    def decide(self, now_s: float, spare_s: float = math.inf, *, crowded: bool = False) -> Decision:
        """What to do now that the device is free; others would like to have it back after `spare_s`. `crowded`:
        requests wait to be read, of which the policy knows nothing yet."""
        ...

    def settle(self, now_s: float, until_s: float) -> Decision:
        """What to do now that the device is not free until `until_s`: everything but to run."""
        ...

    def foresee(self, wish: Wish, rows: int, now_s: float) -> tuple[Step, ...]:
        """The answers, one after another, that as many average rows with this wish could expect if they arrived now at
        a device that is free: at least one, the first, however late."""
        ...

    def spare_s(self, now_s: float) -> float:
        """For how long the device can be kept from this model, so that the rows without any answer still get one in
        time; infinity if none waits."""
        ...

    def wake_s(self) -> float:
        """When to ask again even though nothing happens; infinity for never. Always after the latest `decide`."""
        ...

    def waiting(self) -> int:
        """How many rows wait (those that run do not)."""
        ...
