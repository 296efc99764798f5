"""Requests in a crowd: in what order they begin, and who is refused unread."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.gate import Gate, Pace

Kind = Literal["in time", "late", "gone"]


@dataclass
class Request:
    """Writes down what becomes of it, and in which turn of the loop."""

    kind: Kind
    turn: list[int]
    begun: int | None = None
    refused: int | None = None
    forgotten: bool = False

    @property
    def gone(self) -> bool:
        return self.kind == "gone"

    arrived_s: float = 0.0

    def budget_s(self) -> float | None:
        return 0.0 if self.kind == "late" else None

    def begin(self) -> None:
        assert self.begun is None
        self.begun = self.turn[0]

    def refuse(self) -> None:
        assert self.refused is None
        self.refused = self.turn[0]

    def forget(self) -> None:
        assert not self.forgotten
        self.forgotten = True


@dataclass
class Crowd:
    """Some requests that come at once."""

    kinds: list[Kind]
    turn: list[int] = field(default_factory=lambda: [0])
    requests: list[Request] = field(default_factory=list)

    def play(self) -> Gate:
        gate = Gate()

        async def come() -> None:
            for kind in self.kinds:
                self.requests.append(Request(kind, self.turn))
                gate.enter(self.requests[-1])
            while gate.waiting():
                self.turn[0] += 1
                await asyncio.sleep(0)

        asyncio.run(come())
        return gate


@given(st.lists(st.sampled_from(["in time", "late", "gone"]), max_size=60))
def test_a_crowd_begins_in_order_a_few_in_each_turn_of_the_loop(kinds: list[Kind]) -> None:
    crowd = Crowd(kinds)
    gate = crowd.play()
    assert gate.waiting() == 0
    # Who need not wait begins whatever its budget: what is too late then is for the app to say.
    for place, request in enumerate(crowd.requests):
        assert (request.begun is not None) == (place < 8 or request.kind == "in time")
        assert (request.refused is not None) == (place >= 8 and request.kind == "late")
        assert request.forgotten == (place >= 8 and request.kind == "gone")
    turns = [request.begun for request in crowd.requests if request.begun is not None]
    assert turns == sorted(turns)
    served = [request.begun if request.begun is not None else request.refused for request in crowd.requests]
    assert all(served.count(turn) <= 8 for turn in set(served) - {None})


def test_who_would_be_late_by_what_answers_take_is_refused() -> None:
    gate, turn = Gate(), [0]
    now_s = time.monotonic()
    for took_s in (0.1, 0.2, 0.3, 9.0):
        gate.pace.answered(10.0, took_s, now_s)

    @dataclass
    class Asks(Request):
        def budget_s(self) -> float:
            return 60.0

    waited = [60.0] * 8 + [59.75, 59.65, 0.0]  # who need not wait is not judged
    requests = [Asks("in time", turn, arrived_s=now_s - waited_s) for waited_s in waited]

    async def come() -> None:
        for request in requests:
            gate.enter(request)
        await asyncio.sleep(0)

    asyncio.run(come())
    assert [request.refused is None for request in requests] == [True] * 8 + [False, True, True]


def test_in_a_crowd_a_request_counts_from_when_the_loop_read_last(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr("service.gate.time", SimpleNamespace(monotonic=lambda: now_s))
    gate, turn = Gate(), [0]
    assert gate.came_s(now_s) == now_s

    async def come() -> list[float]:
        nonlocal now_s
        for _ in range(17):  # two turns, and one more
            gate.enter(Request("in time", turn))
        assert gate.came_s(now_s) == now_s  # all that came yet
        came_s = []
        for _ in range(3):
            await asyncio.sleep(0)
            now_s += 1  # what has begun takes its time, in which nothing is read
            came_s.append(gate.came_s(now_s))
        return came_s

    assert asyncio.run(come()) == [1000.0, 1001.0, 1003.0]  # the last turn begins with nobody waiting


def test_a_stall_does_not_shut_the_gate_for_those_who_ask_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug found: all were refused by what answers had taken during the stall, so there were no others to learn from."""
    now_s = 1000.0
    monkeypatch.setattr("service.gate.time", SimpleNamespace(monotonic=lambda: now_s))
    gate = Gate()
    begun: list[float] = []
    refused: list[float] = []
    again: list[Client] = []
    for _ in range(64):
        gate.pace.answered(60.0, 100.0, now_s)

    @dataclass
    class Client(Request):
        def budget_s(self) -> float:
            return 60.0

        def begin(self) -> None:
            gate.pace.answered(60.0, 0.001, now_s)
            begun.append(now_s)

        def refuse(self) -> None:
            refused.append(now_s)
            again.append(self)

    async def come() -> None:
        nonlocal now_s
        for _ in range(50):
            gate.enter(Client("in time", [0], arrived_s=now_s - 40.0))
        for _ in range(100):
            await asyncio.sleep(0)
            now_s += 1.0
            for client in again:
                client.arrived_s = now_s - 40.0
                gate.enter(client)
            again.clear()

    asyncio.run(come())
    assert len(begun) == 50
    assert len(refused) > 100
    assert max(refused) <= 1060.0  # a budget after the latest answer of before


def test_the_pace_is_that_of_the_latest_answers() -> None:
    pace = Pace()
    assert pace.takes_s(60.0, 0.0) == 0  # until something is known
    for _ in range(64):
        pace.answered(60.0, 5.0, 0.0)
    assert pace.takes_s(60.0, 0.0) == 5
    for took_s in range(64):
        pace.answered(60.0, took_s / 64, 10.0)
    assert pace.takes_s(60.0, 70.0) == 47 / 64
    assert pace.takes_s(60.0, 70.1) == 0  # nothing is known any more


def test_who_may_wait_for_long_says_nothing_about_who_may_not() -> None:
    pace = Pace()
    for _ in range(10):
        pace.answered(0.05, 0.01, 0.0)
        pace.answered(50.0, 20.0, 0.0)
    assert pace.takes_s(0.05, 0.0) == 0.01
    assert pace.takes_s(0.01, 0.0) == 0
    assert pace.takes_s(60.0, 0.0) == 20


def test_nobody_is_refused_who_waited_for_less_than_a_quarter_of_the_budget() -> None:
    pace = Pace()
    pace.answered(1.0, 0.9, 0.0)
    assert pace.takes_s(1.0, 0.0) == 0.75
