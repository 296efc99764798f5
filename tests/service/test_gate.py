"""Requests in a crowd: in what order they begin, and who is refused unread."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.gate import AT_ONCE, Gate, Line, Pace, Room

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

    def play(self, gate: Gate | None = None) -> Gate:
        gate = gate or Gate()

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


@dataclass
class Asking(Request):
    """One with a budget."""

    asked_s: float = 10.0

    def budget_s(self) -> float:
        return self.asked_s


def asking(count: int, budget_s: float = 10.0, arrived_s: float | None = None) -> list[Asking]:
    now_s = time.monotonic() if arrived_s is None else arrived_s
    return [Asking("in time", [0], arrived_s=now_s, asked_s=budget_s) for _ in range(count)]


def begun(requests: list[Asking]) -> int:
    return sum(request.begun is not None for request in requests)


async def through(gate: Gate) -> None:
    async with asyncio.timeout(10):
        while gate.waiting():
            await asyncio.sleep(0.001)


def test_nobody_begins_while_more_are_in_hand_than_begin_in_half_a_budget() -> None:
    """Bug found: of pictures, which take a millisecond each to read, an overload had forty in hand, and all were just late."""

    async def come() -> None:
        in_hand: list[float] = []
        gate = Gate(lambda: in_hand)
        requests = asking(10 * AT_ONCE)
        for request in requests:
            gate.enter(request)
        for _ in range(3):  # the first turns tell how many begin in a while
            await asyncio.sleep(0)
        assert begun(requests) == 4 * AT_ONCE
        in_hand += [0.0] * 10_000_000
        await asyncio.sleep(0.01)
        assert begun(requests) == 4 * AT_ONCE
        assert gate.waiting() == 6 * AT_ONCE
        in_hand.clear()
        await through(gate)
        assert begun(requests) == len(requests)

    asyncio.run(come())


def test_who_waits_for_room_and_becomes_late_is_refused_there_and_who_has_gone_is_forgotten() -> None:
    async def come() -> None:
        in_hand: list[float] = []
        gate = Gate(lambda: in_hand)
        requests = asking(10 * AT_ONCE, budget_s=0.2)
        requests[-1].kind = "gone"
        for request in requests:
            gate.enter(request)
        for _ in range(3):
            await asyncio.sleep(0)
        in_hand += [0.0] * 10_000_000
        gate.pace.answered(0.2, 0.1, time.monotonic())
        await through(gate)
        assert begun(requests) == 4 * AT_ONCE
        assert all((each.refused is None) == (each.begun is not None) for each in requests[:-1])
        assert requests[-1].forgotten

    asyncio.run(come())


def test_requests_in_hand_that_have_more_time_keep_nobody_waiting() -> None:
    """The policy lets whoever has less go before them."""

    async def come() -> None:
        now_s = time.monotonic()
        gate = Gate(lambda: [now_s + 60.0] * 10_000)
        requests = asking(10 * AT_ONCE)
        for request in requests:
            gate.enter(request)
        await through(gate)
        assert begun(requests) == len(requests)

    asyncio.run(come())


def test_who_has_no_budget_waits_for_no_room() -> None:
    gate = Gate(lambda: [0.0] * 10_000)
    crowd = Crowd(["in time"] * 100)
    assert crowd.play(gate) is gate
    assert all(request.begun is not None for request in crowd.requests)


def test_however_a_crowd_ends_the_next_one_has_one_turn_at_a_time() -> None:
    """Bug found: after a turn that only refused, there were two in each turn of the loop."""

    async def come() -> None:
        gate = Gate()
        gate.pace.answered(10.0, 5.0, time.monotonic())
        for request in asking(AT_ONCE) + asking(AT_ONCE // 2, arrived_s=time.monotonic() - 6):
            gate.enter(request)
        await asyncio.sleep(0)
        assert not gate.waiting()
        requests = asking(10 * AT_ONCE)
        before = 0
        for request in requests:
            gate.enter(request)
        while gate.waiting():
            assert begun(requests) - before <= AT_ONCE
            before = begun(requests)
            await asyncio.sleep(0)

    asyncio.run(come())


def test_one_that_fails_does_not_keep_the_others_waiting() -> None:
    async def come() -> None:
        told: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
        gate = Gate()
        requests = asking(4 * AT_ONCE)
        requests[2 * AT_ONCE].begun = 0  # begins twice, which raises
        for request in requests:
            gate.enter(request)
        await through(gate)
        await asyncio.sleep(0)
        assert begun(requests) == len(requests)
        assert len(told) == 1

    asyncio.run(come())


@given(st.lists(st.tuples(st.integers(1, AT_ONCE), st.floats(1e-5, 1.0)), min_size=1), st.floats(1e-3, 10.0))
def test_room_is_for_those_who_begin_in_half_a_budget_and_for_two_turns_at_least(
    turns: list[tuple[int, float]], budget_s: float
) -> None:
    room = Room()
    assert room.most(budget_s) == math.inf
    for begun, took_s in turns:
        room.turned(begun, took_s)
    rates = [begun / took_s for begun, took_s in turns]
    most = room.most(budget_s)
    assert max(2 * AT_ONCE, min(rates) * budget_s / 2 * 0.999) <= most
    assert most <= max(2 * AT_ONCE, max(rates) * budget_s / 2 * 1.001)
    assert room.most(None) == math.inf


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


def test_who_is_sure_to_be_in_time_begins_before_who_is_not() -> None:
    pace = Pace()
    for took_s in [1.0] * 90 + [3.0] * 10:
        pace.answered(10.0, took_s, 8.0)
    line = Line[float](pace, lambda came_s: (came_s, 10.0))
    for came_s in (0.0, 2.0, 2.5, 4.0, 5.0):
        line.append(came_s)
    now_s = 10.5  # the first is late, the second has 1.5 seconds left
    assert [line.next(now_s) for _ in range(5)] == [
        (0.0, True),
        (4.0, False),
        (5.0, False),
        (2.0, False),
        (2.5, False),
    ]
    assert not line


def test_who_has_become_late_hears_of_it_before_anybody_begins() -> None:
    """However many are sure: the others are not to wait for longer than makes sense."""
    pace = Pace()
    for took_s in [1.0] * 90 + [3.0] * 10:
        pace.answered(10.0, took_s, 8.0)
    line = Line[float](pace, lambda came_s: (came_s, 10.0))
    for came_s in (0.0, 2.0, 2.0):
        line.append(came_s)
    assert line.next(8.0) == (2.0, False)
    assert line.next(9.5) == (0.0, True)
    assert line.next(9.5) == (2.0, False)


def test_who_has_no_budget_does_not_overtake_who_may_yet_be_in_time() -> None:
    """Bug found: as long as others without a budget came, a request that was a little in doubt waited until it was late."""
    pace = Pace()
    for took_s in [1.0] * 90 + [3.0] * 10:
        pace.answered(10.0, took_s, 8.0)
    asked = {"doubtful": (0.0, 10.0), "sure": (5.0, 10.0), "patient": (0.0, None)}
    line = Line[str](pace, asked.__getitem__)
    for request in ("patient", "doubtful", "patient", "sure", "patient"):
        line.append(request)
    assert [line.next(8.0)[0] for _ in range(5)] == ["patient", "sure", "doubtful", "patient", "patient"]


def test_few_are_looked_at_in_a_crowd_that_is_all_in_doubt() -> None:
    """Bug found: a thousand were, before the first of them began, which took as long as their budgets."""
    pace = Pace()
    for took_s in [1.0] * 90 + [3.0] * 10:
        pace.answered(10.0, took_s, 8.0)
    looked_at: list[int] = []

    def ask(place: int) -> tuple[float, float]:
        looked_at.append(place)
        return 0.0 if place < 1000 else 5.0, 10.0

    line = Line[int](pace, ask)
    for place in range(1001):
        line.append(place)
    assert line.next(8.0) == (0, False)
    assert len(looked_at) < 64
    begun = [line.next(8.0)[0] for _ in range(1000)]
    assert [place for place in begun if place < 1000] == list(range(1, 1000))
    assert begun.index(1000) < 100  # who is sure is found soon nevertheless


@given(
    st.lists(st.tuples(st.floats(0, 10), st.none() | st.floats(0.1, 10))),
    st.lists(st.floats(0, 3), max_size=70),
    st.integers(1, 5),
)
def test_everybody_waits_no_more_once(
    requests: list[tuple[float, float | None]], took_s: list[float], at_a_time: int
) -> None:
    pace = Pace()
    for each_s in took_s:
        pace.answered(0.1, each_s, 10.0)
    line = Line[int](pace, requests.__getitem__)
    for place in range(len(requests)):
        line.append(place)
    now_s, done = 10.0, []
    while line:
        for _ in range(min(at_a_time, len(line))):
            place, late = line.next(now_s)
            arrived_s, budget_s = requests[place]
            assert late == (pace.outlook(arrived_s, budget_s, now_s) == "late")
            done.append(place)
        now_s += 0.1
    assert sorted(done) == list(range(len(requests)))


def test_the_pace_is_that_of_the_latest_answers() -> None:
    pace = Pace()
    assert pace.takes_s(60.0, 0.0) == (0, 0)  # until something is known
    for _ in range(64):
        pace.answered(60.0, 5.0, 0.0)
    assert pace.takes_s(60.0, 0.0) == (5, 5)
    for took_s in range(64):
        pace.answered(60.0, took_s / 64, 10.0)
    assert pace.takes_s(60.0, 70.0) == (47 / 64, 61 / 64)
    assert pace.takes_s(60.0, 70.1) == (0, 0)  # nothing is known any more


def test_who_may_wait_for_long_says_nothing_about_who_may_not() -> None:
    pace = Pace()
    for _ in range(10):
        pace.answered(0.05, 0.01, 0.0)
        pace.answered(50.0, 20.0, 0.0)
    assert pace.takes_s(0.05, 0.0) == (0.01, 0.01)
    assert pace.takes_s(0.01, 0.0) == (0, 0)
    assert pace.takes_s(60.0, 0.0) == (20, 20)


def test_nobody_is_refused_who_waited_for_less_than_a_quarter_of_the_budget() -> None:
    pace = Pace()
    pace.answered(1.0, 0.9, 0.0)
    assert pace.takes_s(1.0, 0.0) == (0.75, 0.9)
