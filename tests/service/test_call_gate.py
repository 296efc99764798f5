"""gRPC calls in a crowd: in what order they begin, when, and who is refused unread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from contextlib import suppress
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import DeadlineExpired
from service.oip.rpc.gate import CallGate

AT_ONCE, TOGETHER = 8, 16
HOUR_S = 3600.0


class Crowd:
    """Calls that come to a gate, and what becomes of them."""

    def __init__(self) -> None:
        self.gate = CallGate()
        self.begun: list[int] = []
        self.refused: list[int] = []
        self.asked: list[int] = []
        self.go = asyncio.Event()  # the calls that have begun end

    async def call(self, number: int, budget_s: float | None = None, arrived_s: float | None = None) -> None:
        def ask() -> float | None:
            self.asked.append(number)
            return budget_s

        try:
            await self.gate.enter(time.monotonic() if arrived_s is None else arrived_s, ask)
        except DeadlineExpired:
            self.refused.append(number)
            return
        self.begun.append(number)
        await self.go.wait()
        self.gate.leave()

    def come(self, number: int, budget_s: float | None = None, arrived_s: float | None = None) -> asyncio.Task[None]:
        return asyncio.create_task(self.call(number, budget_s, arrived_s))


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The gate's time, `now_s`, which a test moves."""
    clock = SimpleNamespace(now_s=1000.0)
    clock.monotonic = lambda: clock.now_s
    monkeypatch.setattr("service.oip.rpc.gate.time", clock)
    return clock


def play(story: Coroutine[None, None, None]) -> None:
    asyncio.run(story)


def test_few_begin_at_once_and_the_others_when_nobody_new_comes() -> None:
    async def story() -> None:
        crowd = Crowd()
        calls = []
        for number in range(40):  # one in each turn, as the library takes them
            calls.append(crowd.come(number))
            await turns(1)
            assert crowd.begun == list(range(min(number + 1, AT_ONCE)))
        assert crowd.gate.waiting() == 40 - AT_ONCE
        await turns(14)
        assert crowd.begun == list(range(AT_ONCE + TOGETHER))
        await turns(14)
        assert crowd.begun == list(range(40))
        assert crowd.gate.waiting() == 0
        crowd.go.set()
        await asyncio.gather(*calls)
        again = crowd.come(40)  # nobody is here any more
        await turns(1)
        assert crowd.begun[-1] == 40
        await again

    play(story())


def test_those_who_wait_begin_though_somebody_new_comes_all_the_time(clock: SimpleNamespace) -> None:
    async def story() -> None:
        crowd = Crowd()
        calls = []
        for number in range(60):
            calls.append(crowd.come(number, arrived_s=clock.now_s))
            await turns(1)
            clock.now_s += 0.001
        assert AT_ONCE + TOGETHER <= len(crowd.begun) < 60
        crowd.go.set()
        await asyncio.gather(*calls)

    play(story())


@given(st.lists(st.sampled_from(["in time", "late", "gone", "without a budget"]), max_size=70))
def test_all_begin_in_order_but_who_is_late_or_gone(kinds: list[str]) -> None:
    async def story() -> None:
        crowd = Crowd()
        calls = []
        for number, kind in enumerate(kinds):
            budget_s = {"in time": HOUR_S, "late": 0.0}.get(kind)
            calls.append(crowd.come(number, budget_s, time.monotonic() - 1))
        await turns(1)
        for call, kind in zip(calls[AT_ONCE:], kinds[AT_ONCE:], strict=True):
            if kind == "gone":
                call.cancel()
        while crowd.gate.waiting():
            await turns(1)
        crowd.go.set()
        await asyncio.gather(*calls, return_exceptions=True)
        waited = list(enumerate(kinds))[AT_ONCE:]
        assert crowd.refused == [number for number, kind in waited if kind == "late"]
        assert crowd.begun[:AT_ONCE] == list(range(min(AT_ONCE, len(kinds))))  # who need not wait is not judged
        assert crowd.begun[AT_ONCE:] == [number for number, kind in waited if kind in ("in time", "without a budget")]
        assert set(crowd.asked) == {number for number, kind in waited if kind != "gone"}
        alone = [crowd.come(100 + number) for number in range(AT_ONCE)]  # whoever left has left
        await turns(1)
        assert crowd.begun[-AT_ONCE:] == [100 + number for number in range(AT_ONCE)]
        await asyncio.gather(*alone)

    play(story())


def test_who_would_be_late_by_what_answers_take_is_refused() -> None:
    async def story() -> None:
        crowd = Crowd()
        now_s = time.monotonic()
        for took_s in (100.0, 200.0, 300.0, 9000.0):
            crowd.gate.pace.answered(HOUR_S, took_s, now_s)
        calls = [crowd.come(number) for number in range(AT_ONCE)]
        calls += [crowd.come(8, HOUR_S, now_s - HOUR_S + 250), crowd.come(9, HOUR_S, now_s - HOUR_S + 350)]
        await turns(15)
        assert (crowd.begun[AT_ONCE:], crowd.refused) == ([9], [8])
        crowd.go.set()
        await asyncio.gather(*calls)

    play(story())


def test_in_a_crowd_a_call_is_thought_to_have_waited_unseen(clock: SimpleNamespace) -> None:
    async def story() -> None:
        crowd = Crowd()
        calls = []
        for number in range(AT_ONCE):
            clock.now_s += 1
            assert crowd.gate.came_s(clock.now_s) == clock.now_s  # few are no crowd
            calls.append(crowd.come(number))
            await turns(1)
        clock.now_s += 0.02  # the loop was busy
        assert crowd.gate.came_s(clock.now_s) == pytest.approx(clock.now_s - 0.015)
        clock.now_s += 1
        assert crowd.gate.came_s(clock.now_s) == pytest.approx(clock.now_s - 0.075)  # at most
        await turns(12)
        clock.now_s += 1
        assert crowd.gate.came_s(clock.now_s) == clock.now_s  # the loop has long been idle, though all are still here
        calls.append(crowd.come(AT_ONCE, arrived_s=clock.now_s))
        await turns(12)
        assert len(crowd.begun) == AT_ONCE + 1
        clock.now_s += 0.02  # and was busy with that one
        assert crowd.gate.came_s(clock.now_s) == pytest.approx(clock.now_s - 0.015)
        crowd.go.set()
        await asyncio.gather(*calls)

    play(story())


def test_a_budget_that_cannot_be_told_harms_nobody_else() -> None:
    async def story() -> None:
        gate = CallGate()
        for _ in range(AT_ONCE):
            await gate.enter(0.0, lambda: None)
        wrong = asyncio.create_task(gate.enter(0.0, lambda: 1 // 0))
        right = asyncio.create_task(gate.enter(0.0, lambda: None))
        await right
        with pytest.raises(ZeroDivisionError):
            await wrong

    play(story())


def test_who_leaves_when_its_turn_has_come_leaves_its_place() -> None:
    async def story() -> None:
        gate = CallGate()
        for _ in range(AT_ONCE):
            await gate.enter(0.0, lambda: None)
        call = asyncio.create_task(gate.enter(0.0, lambda: None))
        while not gate.waiting():
            await turns(1)
        while gate.waiting():
            await turns(1)
        call.cancel()  # before it hears of it, or just after: the loop's order is not ours
        with suppress(asyncio.CancelledError):
            await call
            gate.leave()
        gate.leave()
        await turns(15)
        entered = asyncio.create_task(gate.enter(0.0, lambda: None))
        await turns(1)
        assert entered.done()  # there is one place

    play(story())
