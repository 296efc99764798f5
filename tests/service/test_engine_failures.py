"""What the engine makes of runs that fail, hang or kill their thread, of errors of its own, and of its end."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

import pytest

from service.answers import Answer
from service.dispatch import Run
from service.errors import InferenceFailed, NotReady
from tests.service.bench import bench, run


def test_a_failing_model_fails_its_requests_and_not_the_engine() -> None:
    async def test() -> None:
        async with bench() as b:
            b.runner.error = RuntimeError("broken")
            with pytest.raises(InferenceFailed):
                await b.ask(0.1)
            b.runner.error = None
            assert (await b.ask(0.1)).rows
            assert b.engine.ready

    run(test)


def test_a_surprise_in_the_engine_is_logged_and_fails_who_waits_and_not_the_engine(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error outside of the model once ended the loop in silence: the request hung and later ones got 503."""

    async def test() -> None:
        async with bench() as b:
            monkeypatch.setattr("service.policy.ladder_edf.LadderEdf.decide", lambda *_, **__: 1 / 0)
            with pytest.raises(InferenceFailed):
                await b.ask(0.1)
            monkeypatch.undo()
            assert (await b.ask(0.1)).rows
            assert b.engine.ready

    run(test)
    assert "the engine met an error of its own" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_stopping_refuses_who_waits_and_loses_none() -> None:
    async def test() -> None:
        async with bench() as b:
            b.runner.go.clear()
            b.runner.began.clear()
            running = b.ask(0.1)
            await asyncio.to_thread(b.runner.began.wait, 30)
            waiting = b.ask(0.2)
            await asyncio.sleep(0)
            stopping = asyncio.create_task(b.engine.stop())
            await asyncio.sleep(0)
            b.runner.go.set()
            await stopping
            assert len((await running).rows) == 1
            with pytest.raises(NotReady):
                await waiting
            with pytest.raises(NotReady):
                await b.ask(0.3)

    run(test)


def dies(times: int) -> Callable[[tuple[int, ...]], None]:
    """What a runner does before it runs: end its thread, so many times."""
    left = [times]

    def before(_: tuple[int, ...]) -> None:
        if left[0]:
            left[0] -= 1
            raise SystemExit

    return before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_batch_whose_thread_dies_runs_once_more_and_nobody_notices() -> None:
    async def test() -> None:
        async with bench() as b:
            tasks: list[asyncio.Task[Answer]] = []
            unready: list[bool] = []
            die = dies(1)

            def before(nodes: tuple[int, ...]) -> None:
                unready.append(b.engine.ready)
                die(nodes)

            async def start() -> None:
                tasks.extend(b.ask(0.02 * n, exit_at=0.99, asked_as="confidence") for n in range(8))
                b.runner.before = before

            await b.held(start)
            answers = await asyncio.gather(*tasks)
            assert [row.path for answer in answers for row in answer.rows] == [(1, 2, 3, 4, 5, 6, 7)] * 8
            assert unready[:3] == [True, False, True]
            assert b.engine.ready
            assert b.metric("hbll_worker_deaths_total") == 1

    run(test)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_batch_that_kills_the_thread_twice_fails_and_the_engine_lives_on() -> None:
    """The engine once stayed unready for ever."""

    async def test() -> None:
        async with bench() as b:
            b.runner.before = dies(2)
            with pytest.raises(InferenceFailed):
                await b.ask(0.1)
            assert b.engine.ready
            assert (await b.ask(0.1)).rows
            assert b.metric("hbll_worker_deaths_total") == 2

    run(test)


def test_an_error_after_a_batch_loses_none_of_its_requests(caplog: pytest.LogCaptureFixture) -> None:
    """Rows that ran were in no queue, and were once forgotten: their clients waited for ever."""

    async def test() -> None:
        async with bench() as b:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("service.profile.LatencyProfile.observe", lambda *_, **__: 1 / 0)
                with pytest.raises(InferenceFailed):
                    await b.ask(0.1)
            assert (await b.ask(0.1)).rows
            assert b.engine.ready

    run(test)
    assert "ZeroDivisionError" in caplog.text


def test_an_error_while_answers_are_sent_loses_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Bug found: it was taken for one of the batch that had just begun; whoever was to be answered waited for ever."""

    async def test() -> None:
        async with bench() as b:
            asking: list[asyncio.Task[Answer]] = []

            async def start() -> None:
                asking.extend(b.ask(0.1, path=path) for path in [(4,)] * 3 + [(2, 4)] * 2)  # two runs

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("service.delivery.Delivery._answer", lambda *_: patch.undo() or 1 / 0)
                with pytest.raises(InferenceFailed):
                    await b.held(start)
            results = await asyncio.gather(*asking, return_exceptions=True)
            assert {type(result) for result in results} == {InferenceFailed}
            assert (await b.ask(0.1)).rows
            assert not b.engine._tickets

    run(test)
    assert "ZeroDivisionError" in caplog.text


def test_an_error_while_stopping_does_not_keep_the_engine_from_its_end() -> None:
    async def test() -> None:
        async with bench() as b:
            b.runner.go.clear()
            b.runner.began.clear()
            running = b.ask(0.1)
            await asyncio.to_thread(b.runner.began.wait, 30)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("service.profile.LatencyProfile.observe", lambda *_, **__: 1 / 0)
                stopping = asyncio.create_task(b.engine.stop())
                await asyncio.sleep(0)
                b.runner.go.set()
                await stopping
            with pytest.raises(InferenceFailed):
                await running

    run(test)


def test_an_input_on_which_the_model_overflows_fails_alone() -> None:
    """An answer that is no number once broke the order of the queues, and with it everybody's requests."""

    async def test() -> None:
        async with bench() as b:
            tasks: list[asyncio.Task[Answer]] = []

            async def start() -> None:
                tasks.extend([b.ask(float("nan")), b.ask(0.1)])

            await b.held(start)
            with pytest.raises(InferenceFailed, match="overflowed"):
                await tasks[0]
            assert (await tasks[1]).rows

    run(test)


def test_a_run_that_hangs_makes_the_server_unready_until_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with bench(hung_s=0.01) as b:
            b.runner.go.clear()
            stuck = b.ask(0.1, path=(4,))
            while b.engine.ready:
                await asyncio.sleep(0.001)
            with pytest.raises(NotReady, match="stuck: ask again in a second"):
                await b.ask(0.1)
            while not b.metric("hbll_worker_hangs_total"):
                await asyncio.sleep(0.001)
            assert (
                "inference of 1 rows of version 1 of fake has not ended after 0.1 s, and 0.001 s were expected"
                in caplog.text
            )
            b.runner.go.set()
            assert (await stuck).rows[0].path == (4,)
            assert b.engine.ready
            assert (await b.ask(0.1, path=(4,))).rows
            assert b.metric("hbll_worker_hangs_total") == 1

    run(test)


def test_a_run_that_hung_keeps_nothing_of_its_model() -> None:
    async def test() -> None:
        async with bench(hung_s=0.01) as b:
            b.runner.go.clear()
            stuck = b.ask(0.1, path=(4,))
            while not b.metric("hbll_worker_hangs_total"):
                await asyncio.sleep(0.001)
            b.runner.go.set()
            await stuck
            del stuck
            while [each for each in gc.get_objects() if type(each) is Run and each.model is b.model]:
                await asyncio.sleep(0.001)

    run(test)


def test_a_run_that_hangs_does_not_keep_the_server_from_ending(caplog: pytest.LogCaptureFixture) -> None:
    """It once waited for that run, until somebody killed it."""

    async def test() -> None:
        async with bench(hung_s=0.01) as b:
            b.runner.go.clear()
            stuck, waiting = b.ask(0.1, path=(4,)), b.ask(0.1)
            while b.engine.ready:
                await asyncio.sleep(0.001)
            await b.engine.stop()
            for request in (stuck, waiting):
                with pytest.raises(NotReady, match="shutting down"):
                    await request
            assert "a run hangs: the server ends without it" in caplog.text

    run(test)
