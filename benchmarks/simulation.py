"""A discrete-event simulation of servers that run a policy: simulated time, real policy code, real outcomes.

A server is what the engine is: a bounded queue, one inference at a time, the policy asked whenever the device is free.
How long runs take comes from a measured latency profile, and what each input is answered at each path from the recorded
outcomes of a real bundle. Requests have one row each.
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
        hop_s: what a run costs beyond the inference: to the inference thread and back.
        jitter: standard deviation of the logarithm of a run's time.
        send_s: from the decision that an answer is final to its client's having it.
        receive_s: from a request's sending to its arrival in the queue.
    """

    hop_s: float = 0.0
    jitter: float = 0.1
    send_s: float = 0.0
    receive_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Request(Row):
    image: int = 0
    server: int = 0


@dataclass(slots=True)
class Report(Shares):
    """What became of the requests of a trace; latency is infinite where there was no answer. `counts`: how many were
    answered, expired, refused, and found the queue full."""

    counts: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Server:
    policy: Policy
    offer: Offer
    running: Batch | None = None
    ran_s: float = 0.0
    ends_s: float = 0.0
    wake_s: float = math.inf


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
    fleet = [_Server(*make()) for _ in range(servers)]
    report = Report(budget_s, np.zeros(count, np.int16), np.zeros(count, np.bool_), np.full(count, np.inf))
    depth, right, latency = report.depth, report.right, report.latency_s
    counts = {"answered": 0, "expired": 0, "refused": 0, "full": 0}
    events: list[tuple[float, int, int]] = []  # time, number, server: a run's end or a wake-up
    number = 0
    sent = arrivals_s.tolist()
    received = (arrivals_s + hardware.receive_s).tolist()

    def settle(server: _Server, index: int, now: float) -> None:
        """Ask the policy what to do, now that the device is free."""
        nonlocal number
        decision = server.policy.decide(now)
        for row, _ in decision.done:
            assert isinstance(row, _Request)
            assert row.answered is not None
            depth[row.order] = len(row.answered)
            right[row.order] = outcomes.right[row.answered][row.image]
            latency[row.order] = now + hardware.send_s - sent[row.order]
            server.offer.profile.observe_send(hardware.send_s)
        counts["answered"] += len(decision.done)
        counts["expired"] += len(decision.expired)
        counts["refused"] += len(decision.refused)
        batch = decision.batch
        if batch is None:
            wake = server.policy.wake_s()
            if wake < math.inf and wake != server.wake_s:
                server.wake_s = wake
                number += 1
                heapq.heappush(events, (wake, number, index))
            return
        typical_s = server.offer.profile.typical_s(batch.segment, len(batch.rows))
        number += 1
        server.running, server.ran_s = batch, typical_s * noise[number & 4095]
        server.ends_s = now + server.ran_s + hardware.hop_s
        heapq.heappush(events, (server.ends_s, number, index))

    def happens(now: float, index: int) -> None:
        server = fleet[index]
        batch = server.running
        if batch is not None:
            if now < server.ends_s:
                return  # a wake-up while it runs
            server.running = None
            server.offer.profile.observe(batch.segment, len(batch.rows), server.ran_s, hardware.hop_s)
            confidences = [
                outcomes.confidence[row.target][row.image] if len(row.rest.nodes) == len(batch.segment.nodes) else 0.0
                for row in batch.rows
                if isinstance(row, _Request)
            ]
            server.policy.finished(batch, confidences, now)
        settle(server, index, now)

    position = 0
    while position < count or events:
        if events and (position == count or events[0][0] <= received[position]):
            now, _, index = heapq.heappop(events)
            happens(now, index)
            continue
        now = received[position]
        index = first[position]
        if servers > 1:
            other = second[position]
            if _load(fleet[other]) < _load(fleet[index]):
                index = other
        server = fleet[index]
        if server.policy.waiting() >= max_queue_rows:
            counts["full"] += 1
        else:
            wish = Wish(deadline_s=sent[position] + budget_s)
            server.policy.arrive(_Request(wish, now, position, image=images[position]), now)
            if server.running is None:
                settle(server, index, now)
        position += 1
    report.counts = counts
    return report


def _load(server: _Server) -> int:
    return server.policy.waiting() + (len(server.running.rows) if server.running is not None else 0)
