"""Plays traces on policies: a device that runs what they decide, and notes what becomes of every row.

It knows from its own books where each row is, so that it can tell when a policy runs what cannot be run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from family.tree import Path, Tree
from service.policy import make_policy
from service.policy.state import Batch, Decision, Offer, Policy, Row
from service.policy.wish import Wish
from service.profile import LatencyProfile, Parts
from tests.fakes import fake_manifest, rising_accuracies

MAX_BATCH = 4
BLOCK_S = 0.001
RISING = rising_accuracies(Tree(3))
LADDER = {(4,): 0.6, (4, 6): 0.7, (4, 6, 7): 0.75}
FAMILIES: dict[str, dict[Path, float]] = {
    "all": RISING,
    "ladder": LADDER,
    "no ladder": {(2, 4): 0.5, (1, 2, 4): 0.6, (2, 4, 6): 0.7},
    "front": {(1, 2, 3, 4): 0.5, (1, 2, 4, 6, 7): 0.6, (1, 2, 3, 4, 6, 7): 0.7},
    "restart": LADDER | {(2, 4, 6): 0.9},
    "one": {(4, 6): 0.7},
}
NAMES = ["ladder-edf", "cheapest", "max-accuracy", "max-batch", "slackfit", "clockwork", "static", "aimd"]


def parts(costs: Mapping[int, float] | None = None, largest: int = MAX_BATCH) -> Parts:
    """A call costs half a block, a row more a quarter of one; `costs` makes some blocks dearer."""
    batches = tuple(2**k for k in range(largest.bit_length()) if 2**k <= largest)
    blocks = {node: tuple(BLOCK_S * (0.75 + 0.25 * rows) for rows in batches) for node in range(1, 8)}
    return Parts(
        batches=batches,
        call=(BLOCK_S / 2,) * len(batches),
        embed=(BLOCK_S / 10,) * len(batches),
        head=(BLOCK_S / 10,) * len(batches),
        nodes={node: tuple((costs or {}).get(node, 1.0) * time for time in times) for node, times in blocks.items()},
    )


def make_offer(accuracies: dict[Path, float] | None = None, reserve_s: float = 0.0, **profile: object) -> Offer:
    return Offer.of(fake_manifest(accuracies or RISING), LatencyProfile(parts(**profile)), reserve_s)  # type: ignore[arg-type]


def make(name: str, offer: Offer) -> Policy:
    """The policies of one path get the shallowest."""
    path = "-".join(map(str, offer.front[0]))
    return make_policy(f"{name}({path})" if name in ("static", "aimd") else name, offer)


@dataclass(frozen=True, slots=True)
class Come:
    """A row comes at `at_s`, and its client leaves at `leaves_s`; its confidence after so many blocks."""

    at_s: float
    wish: Wish
    confidences: Sequence[float] = (0.5,)
    leaves_s: float = math.inf

    def confidence(self, path: Path) -> float:
        return self.confidences[len(path) % len(self.confidences)]


@dataclass(slots=True, eq=False, kw_only=True)
class Played(Row):
    come: Come
    fate: str = ""  # done, expired, refused or left
    stopped_by: str = ""
    at_s: float = 0.0
    state: Path | None = None  # what its state has been through, if the last run kept it
    runs: list[tuple[Path, bool, float]] = field(default_factory=list)  # nodes, embed, start
    answers: list[Path] = field(default_factory=list)

    @property
    def in_time(self) -> bool:
        """Answered within the budget, but for rounding."""
        return self.fate == "done" and self.at_s <= self.deadline_s + 1e-9


@dataclass
class Device:
    """One policy on one device. `factors`: by how much runs exceed their typical time, in turn; `learns`: from that."""

    policy: Policy
    offer: Offer
    factors: Sequence[float] = (1.0,)
    learns: bool = False
    now_s: float = 0.0
    rows: list[Played] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    log: list[object] = field(default_factory=list)
    events: list[tuple[float, int, Come | Played]] = field(default_factory=list)

    def play(self, trace: Iterable[Come]) -> Device:
        """Until nothing waits any more."""
        self.events = sorted((come.at_s, place, come) for place, come in enumerate(trace))
        for _ in range(10_000):
            self.happens(self.now_s)
            decision = self.policy.decide(self.now_s)
            self.note(decision)
            waiting = self.policy.waiting()
            assert waiting == sum(row.place is not None for row in self.rows)
            assert waiting == sum(not row.fate for row in self.rows) - _size(decision.batch)
            if decision.batch is not None:
                self.run(decision.batch)
                continue
            wake_s = self.policy.wake_s()
            assert wake_s > self.now_s, "asked to be woken at once, which goes on for ever"
            next_s = min(wake_s, self.events[0][0] if self.events else math.inf)
            if next_s == math.inf:
                assert waiting == 0
                return self
            self.now_s = next_s
        raise AssertionError("the policy comes to no end")

    def happens(self, until_s: float) -> None:
        while self.events and self.events[0][0] <= until_s:
            at_s, _, what = self.events.pop(0)
            if isinstance(what, Played):
                if not what.fate:
                    self.policy.leave(what)
                    what.fate, what.at_s = "left", at_s
                continue
            row = Played(what.wish, at_s, len(self.rows), come=what)
            self.rows.append(row)
            self.policy.arrive(row, at_s)
            if what.leaves_s < math.inf:
                self.events.append((max(at_s, what.leaves_s), len(self.rows) + 10**6, row))
                self.events.sort(key=lambda event: event[:2])

    def note(self, decision: Decision) -> None:
        for fate, rows in (("expired", decision.expired), ("refused", decision.refused), ("done", decision.done)):
            for each in rows:
                row, stopped_by = each if isinstance(each, tuple) else (each, "")
                assert isinstance(row, Played)
                assert not row.fate, f"{row.fate} already, and now {fate}"
                row.fate, row.at_s, row.stopped_by = fate, self.now_s, stopped_by
                if fate == "done":
                    assert row.answered == row.answers[-1]
                self.log.append((self.now_s, row.order, fate, stopped_by, row.answered))

    def run(self, batch: Batch) -> None:
        """What a policy decided: it must be possible, and takes its time."""
        segment = batch.segment
        assert 1 <= len(batch.rows) <= self.offer.profile.max_batch
        assert len(set(map(id, batch.rows))) == len(batch.rows)
        assert segment.nodes
        confidences = []
        for row in batch.rows:
            assert isinstance(row, Played)
            assert not row.fate, f"runs although it {row.fate}"
            assert row.rest.embed == segment.embed
            assert row.rest.nodes[: len(segment.nodes)] == segment.nodes
            before: Path | None = () if segment.embed else row.state
            assert before is not None, "its state was not kept"
            state = before + segment.nodes
            ends = state == row.target
            assert batch.predict or not ends
            if ends:
                row.answers.append(row.target)
            row.state = state if batch.keep_state else None
            row.runs.append((segment.nodes, segment.embed, self.now_s))
            confidences.append(row.come.confidence(row.target) if ends else 0.0)
        self.batches.append(batch)
        self.log.append((self.now_s, segment, [row.order for row in batch.rows]))
        took_s = (
            self.offer.profile.typical_s(segment, len(batch.rows)) * self.factors[len(self.batches) % len(self.factors)]
        )
        end_s = self.now_s + took_s
        self.happens(end_s)
        self.now_s = end_s
        if self.learns:
            self.offer.profile.observe(segment, len(batch.rows), took_s)
        self.policy.finished(batch, confidences, end_s)


def _size(batch: Batch | None) -> int:
    return 0 if batch is None else len(batch.rows)


def play(name: str, trace: Iterable[Come], offer: Offer | None = None) -> Device:
    """Play on a profile that is exact."""
    offer = offer or make_offer()
    return Device(make(name, offer), offer).play(trace)


def is_free(wish: Wish) -> bool:
    return wish.path is None and wish.exit_at is None


unit = st.floats(0.0, 1.0)
some_time = st.one_of(st.just(0.0), st.floats(0.0, 0.002), st.floats(0.0, 0.1))


@st.composite
def wishes(draw: st.DrawFn, at_s: float, accuracies: dict[Path, float]) -> Wish:
    kind = draw(st.sampled_from(["none", "none", "path", "confidence", "risk"]))
    budget_s = draw(st.one_of(st.none(), st.floats(-0.001, 0.01), st.floats(0.0, 0.2)))
    return Wish(
        path=draw(st.sampled_from(sorted(accuracies))) if kind == "path" else None,
        exit_at=draw(unit) if kind in ("confidence", "risk") else None,
        asked_as=kind if kind in ("path", "confidence", "risk") else "path",  # type: ignore[arg-type]
        risk=0.1 if kind == "risk" else None,
        deadline_s=None if budget_s is None else at_s + budget_s,
        strict=draw(st.booleans()) and budget_s is not None,
        priority=draw(st.integers(0, 2)),
        patience_s=draw(st.sampled_from([0.0, 0.02, 1.0])),
    )


@st.composite
def traces(draw: st.DrawFn, accuracies: dict[Path, float]) -> list[Come]:
    trace, at_s = [], 0.0
    for _ in range(draw(st.integers(1, 25))):
        at_s += draw(some_time)
        leaves_s = at_s + draw(some_time) if draw(st.integers(0, 4)) == 0 else math.inf
        confidences = draw(st.lists(unit, min_size=1, max_size=4))
        trace.append(Come(at_s, draw(wishes(at_s, accuracies)), confidences, leaves_s))
    return trace


@st.composite
def plays(draw: st.DrawFn, *, exact: bool = False) -> tuple[Offer, list[Come], list[float]]:
    """An offer, a trace, and how runs exceed their typical times."""
    accuracies = FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))]
    costs = draw(st.sampled_from([None, {6: 5.0}, {4: 0.1, 1: 3.0}]))
    offer = make_offer(accuracies, draw(st.sampled_from([0.0, 0.0005])), costs=costs)
    factors = [1.0] if exact else draw(st.lists(st.floats(0.5, 3.0), min_size=1, max_size=5))
    return offer, draw(traces(accuracies)), factors
