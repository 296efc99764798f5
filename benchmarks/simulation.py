"""A discrete-event simulation of servers that run a policy: simulated time, real policy code, real outcomes.

A server is what the engine is: a bounded queue, one inference at a time, and beside that an event loop, which does one
thing after another: in each of its turns it hears whether the run has ended and asks the policy what to do then, sends
answers, and reads as many requests as `service.gate` lets begin. So what comes in a burst waits unseen until the loop gets
round to it. How long runs take comes from a measured latency profile, and what each input is answered at each path from the
recorded outcomes of a real bundle. Requests have one row each.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.shares import Shares
from family.tree import Path
from service.gate import AT_ONCE, BLOCKED_S, Line, Pace, Room
from service.policy.state import Batch, Offer, Policy, Row
from service.policy.wish import Wish

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What `n` inputs are answered at each path: calibrated `confidence (n,)`, and whether the answer is `right (n,)`."""

    confidence: Mapping[Path, Sequence[float]]
    right: Mapping[Path, Sequence[bool]]

    def __len__(self) -> int:
        return len(next(iter(self.right.values())))


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the simulated machines are like, beside the profile's typical times.

    Attributes:
        jitter: standard deviation of the logarithm of a run's time.
        hop_s: what a run takes beyond the inference: to the inference thread and back.
        decide_s: what the event loop takes to hear that a run has ended, and to decide on the next.
        read_s: what it takes to read a request.
        refuse_s: what it takes to refuse one unread, because it waited too long (`service.gate`).
        send_s: what it takes to send an answer.
        wire_s: what a request and its answer take on their way, which clients know of and ask for that much less.
        contention: by what share all that takes the event loop longer while a model runs: they share processors, caches
            and Python's lock.
    """

    jitter: float = 0.1
    hop_s: float = 0.0
    decide_s: float = 0.0
    read_s: float = 0.0
    refuse_s: float = 0.0
    send_s: float = 0.0
    wire_s: float = 0.0
    contention: float = 0.0


@dataclass(slots=True, eq=False)
class _Request(Row):
    begun_s: float = 0.0
    answered_s: float = 0.0
    image: int = 0
    server: int = 0


@dataclass(slots=True)
class Report(Shares):
    """What became of the requests of a trace; latency is infinite where there was no answer. `counts`: how many were
    answered, expired, refused, and found the queue full."""

    counts: dict[str, int] = field(default_factory=dict)


class _Server:
    """`loop_s`: until when its event loop is busy. `turn_s`: when its next turn is, as far as that is known. `unread`: the
    requests that wait for one. `asked`: whether some were read since the policy was asked, which idles."""

    def __init__(self, policy: Policy, offer: Offer, contention: float, asks: Callable[[int], tuple[float, float]]) -> None:
        self.policy, self.offer = policy, offer
        self._contention = contention
        self.running: Batch | None = None
        self.start_s = self.ran_s = self.ends_s = self.loop_s = 0.0
        self.turn_s = math.inf
        self.asked = False
        self.pace = Pace()
        self.unread = Line[int](self.pace, asks)
        self.room = Room()
        self.in_hand = 0  # requests that were read and have no answer yet
        self.begun = 0  # in the latest turn of its loop
        self.blocked = False  # others wait, until some of those in hand have their answers

    def occupy(self, now_s: float, took_s: float) -> float:
        """Its event loop does something next. Returns when it has."""
        start_s = max(now_s, self.loop_s)
        if start_s < self.ends_s:
            took_s *= 1 + self._contention
        self.loop_s = start_s + took_s
        return self.loop_s

    @property
    def load(self) -> int:
        """Requests that wait, and rows that run."""
        running = len(self.running.rows) if self.running is not None else 0
        return len(self.unread) + self.policy.waiting() + running


def simulate(
    arrivals_s: Floats,
    budget_s: float,
    outcomes: Outcomes,
    make: Callable[[], tuple[Policy, Offer]],
    *,
    servers: int = 1,
    hardware: Hardware | None = None,
    max_queue_rows: int = 1024,
    seed: int = 0,
) -> Report:
    """Play a trace of one-row requests with this budget.

    Args:
        arrivals_s: `(n,)`, rising.
        make: a new policy and its offer, per server; the policy learns from the profile of the offer.
        servers: each gets the shorter queue's request of two drawn at random (power of two choices).
        seed: of the images, the routing and the jitter; two policies with the same seed meet the same requests.
    """
    hardware = hardware or Hardware()
    rng = np.random.default_rng(seed)
    count = len(arrivals_s)
    images = rng.integers(len(outcomes), size=count).tolist()
    first, second = (rng.integers(servers, size=(2, count))).tolist()
    noise = np.exp(hardware.jitter * rng.standard_normal(4096)).tolist()
    report = Report(budget_s, np.zeros(count, np.int16), np.zeros(count, np.bool_), np.full(count, np.inf))
    depth, right, latency = report.depth, report.right, report.latency_s
    counts = {"answered": 0, "expired": 0, "refused": 0, "full": 0}
    events: list[tuple[float, int, int]] = []  # time, number, server: a turn of its loop
    number = 0
    sent = arrivals_s.tolist()
    arrives = (arrivals_s + hardware.wire_s / 2).tolist()
    asked_s = budget_s - hardware.wire_s
    fleet = [_Server(*make(), hardware.contention, lambda at: (arrives[at], asked_s)) for _ in range(servers)]

    def settle(server: _Server, now: float) -> None:
        """Ask the policy what to do, now that the device is free."""
        crowded = len(server.unread) > AT_ONCE
        decision = server.policy.decide(now, crowded=crowded)
        batch = decision.batch
        server.asked = crowded and batch is None and server.policy.waiting() > 0
        if batch is not None:
            typical_s = server.offer.profile.typical_s(batch.segment, len(batch.rows))
            server.running, server.start_s = batch, now
            server.ran_s = typical_s * noise[number & 4095]
            server.ends_s = now + server.ran_s + hardware.hop_s
        for row, _ in decision.done:
            assert isinstance(row, _Request)
            assert row.answered is not None
            done_s = server.occupy(now, hardware.send_s)
            depth[row.order] = len(row.answered)
            right[row.order] = outcomes.right[row.answered][row.image]
            latency[row.order] = done_s + hardware.wire_s / 2 - sent[row.order]
            server.pace.answered(asked_s, (row.answered_s - row.begun_s) + (done_s - now), done_s)
            server.offer.profile.observe_send(done_s - now)
        counts["answered"] += len(decision.done)
        counts["expired"] += len(decision.expired)
        counts["refused"] += len(decision.refused)
        server.in_hand -= len(decision.expired) + len(decision.refused)
        for _ in decision.expired:
            server.pace.answered(asked_s, asked_s, now)
        server.occupy(now, hardware.send_s * (len(decision.expired) + len(decision.refused)))

    def hear(server: _Server, now: float) -> None:
        """The run has ended."""
        batch = server.running
        assert batch is not None
        now = server.occupy(now, hardware.decide_s)
        server.running = None
        waited_s = max(0.0, now - server.start_s - server.ran_s)
        server.offer.profile.observe(batch.segment, len(batch.rows), server.ran_s, waited_s)
        confidences = [
            outcomes.confidence[row.target][row.image] if len(row.rest.nodes) == len(batch.segment.nodes) else 0.0
            for row in batch.rows
            if isinstance(row, _Request)
        ]
        unanswered = [row for row in batch.rows if row.answered is None and isinstance(row, _Request)]
        for row in unanswered:
            row.answered_s = now
        server.policy.finished(batch, confidences, now)
        server.in_hand -= sum(row.answered is not None for row in unanswered)
        settle(server, now)

    def read(server: _Server) -> None:
        """The request that is next, if it has the time: see `service.gate`."""
        at, late = server.unread.next(server.loop_s)
        due_s, begun_s = arrives[at] + asked_s, max(arrives[at], server.loop_s)
        if late:
            counts["refused"] += 1
            server.occupy(begun_s, hardware.refuse_s)
            return
        server.begun += 1
        now = server.occupy(begun_s, hardware.read_s)
        if server.policy.waiting() >= max_queue_rows:
            counts["full"] += 1
            return
        server.in_hand += 1
        server.policy.arrive(_Request(Wish(deadline_s=due_s), now, at, begun_s=begun_s, image=images[at]), now)
        server.asked = True

    def turn(server: _Server, now: float) -> None:
        if server.running is not None and server.ends_s <= now:
            hear(server, now)
        elif server.running is None and (server.asked or server.policy.wake_s() <= now):
            settle(server, now)
        server.begun = 0
        room = server.room.most(asked_s) - server.in_hand
        for _ in range(min(AT_ONCE, len(server.unread))):
            if server.begun >= room:
                break
            read(server)
        server.blocked = bool(server.unread) and server.begun >= room
        if server.unread and server.begun:
            server.room.turned(server.begun, server.loop_s - now)

    def plan(server: _Server, index: int, now: float) -> None:
        """When the next turn is: when there is something to do, and the loop has done what it does."""
        nonlocal number
        if (server.unread and not server.blocked) or (server.asked and server.running is None):
            next_s = server.loop_s
        elif server.running is not None:
            next_s = max(server.loop_s, server.ends_s)
        else:
            next_s = max(server.loop_s, min(server.policy.wake_s(), now + BLOCKED_S if server.blocked else math.inf))
        if next_s < math.inf:
            number += 1
            heapq.heappush(events, (next_s, number, index))
        server.turn_s = next_s

    position = 0
    while position < count or events:
        if events and (position == count or events[0][0] < arrives[position]):
            at_s, _, index = heapq.heappop(events)
            server = fleet[index]
            if at_s == server.turn_s:
                turn(server, at_s)
                plan(server, index, at_s)
            continue
        index = first[position]
        if servers > 1:
            other = second[position]
            if fleet[other].load < fleet[index].load:
                index = other
        server = fleet[index]
        server.unread.append(position)
        server.loop_s = max(server.loop_s, arrives[position])
        if server.turn_s > server.loop_s:
            plan(server, index, server.loop_s)
        position += 1
    report.counts = counts
    return report
