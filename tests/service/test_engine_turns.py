"""Who has the device and the event loop, turn by turn."""

from __future__ import annotations

import asyncio
import threading

import pytest

from family.tree import Path
from service.errors import DeadlineExpired
from service.policy.wish import Wish
from service.profile import LatencyProfile
from tests.fakes import fake_parts
from tests.service.bench import bench, rows, run


def test_a_short_run_for_the_only_request_is_done_by_the_event_loop_itself() -> None:
    async def test() -> None:
        async with bench() as b:
            b.model.profile = LatencyProfile(fake_parts(block_s=0.0002))
            b.engine.add(b.model)
            threads: list[str] = []
            b.runner.before = lambda _: threads.append(threading.current_thread().name)
            await b.ask(0.1, path=(4, 6))
            assert threads == ["MainThread"]
            long = b.ask(0.1, path=(1, 2, 3, 4, 5, 6, 7))
            await asyncio.gather(long, b.ask(0.1, path=(4,)), b.ask(0.1, path=(4,)))
            assert threads[1:] == ["inference", "inference"]
            await b.engine.submit(b.model, rows(0.1), Wish(path=(4,)), b.clock(), on_loop=False)
            assert threads[3:] == ["inference"]

    run(test)


@pytest.mark.parametrize("path", [(4,), (1, 2, 3, 4, 5, 6, 7)], ids=["short", "long"])
def test_what_was_decided_where_it_arrived_is_carried_out_though_the_engine_stops(path: Path) -> None:
    async def test() -> None:
        async with bench() as b:
            b.model.profile = LatencyProfile(fake_parts(block_s=0.0002))
            b.engine.add(b.model)
            asked = b.ask(0.1, path=path)
            while not b.engine._turn and not asked.done():
                await asyncio.sleep(0)
            await b.engine.stop()
            assert (await asked).rows[0].path == path

    run(test)


def test_of_two_requests_after_each_other_neither_is_forgotten_if_the_first_leaves() -> None:
    async def test() -> None:
        async with bench() as b:
            b.model.profile = LatencyProfile(fake_parts(block_s=0.0002))
            b.engine.add(b.model)
            first = b.ask(0.1, path=(1, 2, 3, 4, 5, 6, 7))
            while not b.engine._turn:
                await asyncio.sleep(0)
            first.cancel()
            assert (await b.ask(0.2, path=(4,))).rows[0].path == (4,)
            assert (await b.ask(0.2, path=(4, 6))).rows[0].path == (4, 6)
            assert first.cancelled()

    run(test)


def test_between_two_runs_of_its_own_the_event_loop_does_what_else_there_is() -> None:
    """A request of many rows would keep it from all others."""

    async def test() -> None:
        async with bench(max_batch=1) as b:
            b.model.profile = LatencyProfile(fake_parts(batches=(1,), block_s=0.0001))
            b.engine.add(b.model)
            turns, seen = 0, []
            b.runner.before = lambda _: seen.append((threading.current_thread().name, turns))
            asking = b.ask(0.1, 0.2, 0.3, 0.4, path=(4, 6))
            while not asking.done():
                turns += 1
                await asyncio.sleep(0)
            assert [name for name, _ in seen] == ["MainThread"] * 4
            assert len({turn for _, turn in seen}) == 4

    run(test)


@pytest.mark.parametrize("turns", range(6))
def test_who_comes_just_after_a_request_that_is_too_late_does_not_wait_for_the_next_one(turns: int) -> None:
    """Bug found: nothing was to be run for the late one alone, and so the engine went to sleep on whoever came meanwhile."""

    async def test() -> None:
        async with bench() as b:
            late = b.ask(0.1, budget_s=-1.0)
            for _ in range(turns):
                await asyncio.sleep(0)
            other = b.ask(0.1)
            answer = await asyncio.wait_for(other, 30)
            assert [row.path for row in answer.rows] == [(1, 2, 3, 4, 5, 6, 7)]
            with pytest.raises(DeadlineExpired):
                await late

    run(test)
