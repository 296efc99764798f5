"""A server that is told to end while it warms up never says that it is ready."""

from __future__ import annotations

import asyncio
import signal

import pytest
from fastapi import FastAPI

from service.app import create_app, end_soon
from service.listener import Server, server_config
from service.repository import Repository
from service.settings import Settings
from tests.fakes import FakeRunner, fake_model


def _app(runner: FakeRunner) -> FastAPI:
    return create_app(Settings(poll_s=0), Repository([fake_model(runner=runner)]))


async def _warm_up(app: FastAPI) -> None:
    """Until it has ended, however it does."""
    (task,) = (task for task in asyncio.all_tasks() if task.get_name() == "warm-up")
    await asyncio.wait([task], timeout=60)
    assert task.done()


@pytest.mark.parametrize("measured", [False, True])
def test_a_signal_while_warming_up_leaves_the_server_unready(caplog: pytest.LogCaptureFixture, measured: bool) -> None:
    """Bug found: the log said `ready`, after the interrupt."""
    caplog.set_level("INFO")
    runner = FakeRunner()
    app = _app(runner)
    server = Server(server_config(app, Settings()), drain=lambda: asyncio.sleep(0), on_exit=lambda: end_soon(app))

    def interrupt(_nodes: object) -> None:  # while latencies are measured, or in the server's own requests
        if app.state.context.engine.ready is measured:
            server.handle_exit(signal.SIGINT, None)

    async def test() -> None:
        runner.before = interrupt
        async with app.router.lifespan_context(app):
            await _warm_up(app)
            assert server.should_exit
            assert not app.state.context.ready

    asyncio.run(test())
    assert "ready: serving" not in caplog.text


def test_a_server_that_is_stopped_while_warming_up_does_not_say_that_it_is_ready(caplog: pytest.LogCaptureFixture) -> None:
    """As where uvicorn is started by others, and nobody tells of the signal."""
    caplog.set_level("INFO")
    runner = FakeRunner()
    app = _app(runner)

    async def test() -> None:
        requested = asyncio.Event()
        loop = asyncio.get_running_loop()
        runner.before = lambda _: loop.call_soon_threadsafe(requested.set) if app.state.context.engine.ready else None
        async with app.router.lifespan_context(app):
            await requested.wait()

    asyncio.run(test())
    assert "ready: serving" not in caplog.text
    assert "warm-up of version" not in caplog.text


def test_who_is_not_told_to_end_becomes_ready(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    app = _app(FakeRunner())

    async def test() -> None:
        async with app.router.lifespan_context(app):
            await _warm_up(app)
            assert app.state.context.ready

    asyncio.run(test())
    assert "ready: serving fake 1" in caplog.text
