"""Models that are replaced, and versions of one."""

from __future__ import annotations

import asyncio

from service.answers import Answer
from service.policy.wish import Wish
from tests.fakes import FakeRunner, fake_model, rows
from tests.service.bench import bench, run


def test_a_replaced_model_answers_who_waits_and_is_then_forgotten() -> None:
    async def test() -> None:
        async with bench() as b:
            tasks: list[asyncio.Task[Answer]] = []
            new = fake_model(runner=b.runner, version=2)
            await asyncio.to_thread(new.warm_up, 8, b.clock, lambda: False)

            async def start() -> None:
                tasks.append(b.ask(0.1, exit_at=0.99, asked_as="confidence"))
                await asyncio.sleep(0)
                b.engine.add(new)
                b.engine.retire(b.model)

            await b.held(start)
            assert (await tasks[0]).rows[0].stopped_by == "complete"
            assert (await b.engine.submit(new, rows(0.1), Wish(), b.clock())).rows
            assert b.engine.drift(b.model) is None
            # a request that was being read meanwhile
            assert (await b.ask(0.1)).rows
            assert b.engine.foresee(b.model, Wish(), 1)[-1].path == (1, 2, 3, 4, 5, 6, 7)
            assert (await b.engine.submit(new, rows(0.1), Wish(), b.clock())).rows
            assert b.engine.drift(b.model) is None

    run(test)


def test_a_replaced_model_is_forgotten_even_if_the_server_never_idles() -> None:
    async def test() -> None:
        async with bench() as b:
            new = fake_model(runner=b.runner, version=2)
            await asyncio.to_thread(new.warm_up, 8, b.clock, lambda: False)
            b.engine.add(new)
            busy = True

            async def ask() -> None:
                while busy:
                    await b.engine.submit(new, rows(0.1), Wish(path=(4,)), b.clock())

            asking = [asyncio.create_task(ask()) for _ in range(3)]
            b.engine.retire(b.model)
            while b.engine.drift(b.model) is not None:
                await asyncio.sleep(0)
            busy = False
            await asyncio.gather(*asking)

    run(test)


def test_versions_of_a_model_are_counted_apart() -> None:
    async def test() -> None:
        async with bench() as b:
            second = fake_model(runner=FakeRunner(b.clock, 0.001), version=2)
            second.warm_up(8, b.clock, lambda: False)
            b.engine.add(second)
            for model, depth in ((b.model, 1), (second, 2), (second, 2)):
                path = (4, 6)[:depth]
                await b.engine.submit(model, rows(0.1), Wish(path), b.clock())
            assert [b.metric("hbll_requests_total", version=version) for version in ("1", "2")] == [1, 2]
            assert [b.metric("hbll_block_rows_total", version=version) for version in ("1", "2")] == [1, 4]
            assert [b.metric("hbll_answers_total", version="2", depth=depth) for depth in ("1", "2")] == [0, 2]

    run(test)
