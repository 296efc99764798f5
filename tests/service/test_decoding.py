"""Requests whose inputs take long to decode: how many at a time, and who is refused before."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from service.answers import Answer
from service.decoding import Decoding
from service.errors import DeadlineExpired
from service.gate import Pace

AT_ONCE = 2


class Work:
    """Decodes when the test says so, and counts how many do."""

    def __init__(self) -> None:
        self.may = threading.Semaphore(0)
        self.running = self.most = self.done = 0
        self._lock = threading.Lock()

    def __call__(self) -> int:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        assert self.may.acquire(timeout=10)
        with self._lock:
            self.running -= 1
            self.done += 1
            return self.done


async def until(condition: object) -> None:
    async with asyncio.timeout(10):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.001)


def test_few_decode_at_a_time_and_all_in_the_end() -> None:
    async def come() -> None:
        decoding, work = Decoding(AT_ONCE), Work()
        tasks = [asyncio.create_task(decoding.run(work, time.monotonic(), None)) for _ in range(20)]
        await until(lambda: work.running == AT_ONCE)
        assert decoding.waiting() == 20 - AT_ONCE
        work.may.release(20)
        assert sorted(found for found, _ in await asyncio.gather(*tasks)) == list(range(1, 21))
        assert work.most == AT_ONCE
        assert decoding.waiting() == 0
        work.may.release()
        await decoding.run(work, time.monotonic(), None)  # nobody is thought to be busy still

    asyncio.run(come())


def test_who_would_be_late_is_refused_before_the_work() -> None:
    """Bug found: under more pictures than could be decoded all were decoded in turn, each just too late."""

    async def come() -> None:
        decoding, work = Decoding(AT_ONCE), Work()
        now_s = time.monotonic()
        busy = [asyncio.create_task(decoding.run(work, now_s, None)) for _ in range(AT_ONCE)]
        await until(lambda: work.running == AT_ONCE)
        late = asyncio.create_task(decoding.run(work, now_s - 1, 0.5))
        good = asyncio.create_task(decoding.run(work, now_s, 60.0))
        await until(lambda: decoding.waiting() == 2)
        work.may.release(AT_ONCE + 1)
        await asyncio.gather(*busy, good)
        with pytest.raises(DeadlineExpired):
            await late
        assert work.done == AT_ONCE + 1

    asyncio.run(come())


@pytest.mark.parametrize("its_turn", [False, True])
def test_a_client_that_goes_while_it_waits_keeps_nobody_waiting(its_turn: bool) -> None:
    async def come() -> None:
        decoding, work = Decoding(AT_ONCE), Work()
        busy = [asyncio.create_task(decoding.run(work, 0.0, None)) for _ in range(AT_ONCE)]
        await until(lambda: work.running == AT_ONCE)
        leaves, stays = (asyncio.create_task(decoding.run(work, 0.0, None)) for _ in range(2))
        await until(lambda: decoding.waiting() == 2)
        if its_turn:
            decoding._pass_on()  # as the end of a run does; before the task hears of it
        leaves.cancel()
        work.may.release(AT_ONCE + 1)
        await asyncio.gather(*busy, stays)
        with pytest.raises(asyncio.CancelledError):
            await leaves
        assert work.done == AT_ONCE + 1
        assert decoding.waiting() == 0

    asyncio.run(come())


def test_a_budget_that_ran_out_says_how_long_answers_take() -> None:
    """Bug found: where none was in time nothing was known, and all began that had any time left."""
    pace = Pace()
    for _ in range(10):
        pace.ended(10.0, 5.0, None, 12.0)
    assert pace.takes_s(10.0, 12.0) == (7.5, 10.0)
    assert pace.takes_s(5.0, 12.0) == (0.0, 0.0)


def test_what_an_answer_took_to_go_deeper_does_not_count() -> None:
    pace = Pace()
    pace.ended(10.0, 5.0, Answer((), 0.0, 0.0, answered_s=6.0, decided_s=7.5), 8.0)
    assert pace.takes_s(10.0, 8.0) == (1.5, 1.5)
