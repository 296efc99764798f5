"""What the engine does in an overload: see `tests.service.bench`."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import suppress

import numpy as np
import pytest

from service.answers import Answer
from service.errors import DeadlineExpired
from service.policy.wish import Wish
from tests.fakes import rows
from tests.service.bench import bench, run


def test_nothing_goes_deeper_while_requests_wait_unread_and_then_it_does() -> None:
    async def test() -> None:
        async with bench() as b:
            unread = 1
            b.engine.unread = lambda: unread
            deeper = b.ask(0.65, exit_at=0.945, asked_as="confidence", budget_s=1.0)
            for _ in range(20):
                await asyncio.sleep(0)
            other = await b.ask(0.1, path=(4, 6), budget_s=1.0)  # is on its way to its first answer
            assert [row.path for row in other.rows] == [(4, 6)]
            assert not deeper.done()
            assert b.runner.runs == [((4,), 1, True), ((4, 6), 1, True)]
            assert not b.engine.idle
            unread = 0
            answer = await asyncio.wait_for(deeper, 30)  # without anybody else who comes
            assert [row.path for row in answer.rows] == [(4, 6, 7)]

    run(test)


def test_in_hand_are_requests_with_a_budget_that_runs_and_no_answer_yet() -> None:
    async def test() -> None:
        async with bench() as b:

            async def ask() -> None:
                b.engine.unread = lambda: 1  # nothing goes deeper
                asked.append(b.ask(0.65, 0.65, exit_at=0.945, asked_as="confidence", budget_s=1.0))
                b.ask(0.1, path=(4,))  # has no budget
                tasks.append(asyncio.create_task(b.engine.submit(*by_grpc, b.clock(), on_loop=False)))
                b.ask(0.1, path=(4,), budget_s=0.0001).add_done_callback(lambda each: each.exception())
                await asyncio.sleep(0)
                assert sorted(b.engine.in_hand()) == pytest.approx([b.clock() + 0.0001, b.clock() + 1.0])
                b.clock.now_s += 0.001  # of one it has run out
                assert b.engine.in_hand() == pytest.approx([b.clock() + 0.999])

            asked: list[asyncio.Task[Answer]] = []
            tasks: list[asyncio.Task[Answer]] = []
            by_grpc = b.model, rows(0.1), Wish(deadline_s=b.clock() + 1.0, path=(4,))
            assert b.engine.in_hand() == []
            await b.held(ask)
            async with asyncio.timeout(30):
                while b.engine.in_hand():  # until it has an answer
                    await asyncio.sleep(0.001)
            assert not asked[0].done()  # and waits for a better one
            b.engine.unread = lambda: 0
            await asyncio.gather(asked[0], *tasks)

    run(test)


def test_an_answer_says_when_its_rows_had_one_each_and_when_it_was_final() -> None:
    """One row is content with its first answer, the other climbs for two blocks more."""

    async def test() -> None:
        async with bench() as b:
            began_s = b.clock()
            answer = await b.ask(0.85, 0.65, exit_at=0.945, asked_as="confidence")
            assert [row.path for row in answer.rows] == [(4,), (4, 6, 7)]
            assert answer.answered_s - began_s == pytest.approx(0.001)
            assert answer.decided_s - began_s == pytest.approx(0.003)
            assert b.engine.idle

    run(test)


def test_a_request_that_is_refused_leaves_nothing_for_the_garbage_collector() -> None:
    """Bug found: its error had the frame in which it was raised, which had the future that had the error. In an overload
    such cycles by the thousand took the collector 50 ms."""

    async def test() -> None:
        async with bench() as b:
            x = np.full((1, 2, 2), 0.1, np.float32)
            gone = weakref.ref(x)
            with suppress(DeadlineExpired):
                await b.engine.submit(b.model, x, Wish(deadline_s=b.clock() - 1), b.clock())
                pytest.fail("it was answered")
            del x
            await asyncio.sleep(0)  # the loop is through with the future
            assert gone() is None

    gc.collect()
    gc.disable()
    try:
        run(test)
    finally:
        gc.enable()
