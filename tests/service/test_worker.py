"""Real threads, which really die. What kills one between its jobs is CPython's way to raise in another thread."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable

import pytest

from service.worker import Worker, WorkerDied

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), timeout=30))  # type: ignore[arg-type]


def thread_of(name: str) -> threading.Thread:
    (thread,) = (thread for thread in threading.enumerate() if thread.name == name)
    return thread


def kill(thread: threading.Thread) -> None:
    """It dies as soon as it next runs Python."""
    assert thread.ident is not None
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)) == 1


def die() -> None:
    raise SystemExit


def test_results_and_exceptions_come_back_in_order() -> None:
    async def test() -> None:
        worker = Worker("ordered")
        ended: list[int] = []
        futures = [worker.run(lambda n=n: n if n % 3 else 1 // n * 0 // 0) for n in range(10)]
        for number, future in enumerate(futures):
            future.add_done_callback(lambda _, number=number: ended.append(number))
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert [result for result in results if isinstance(result, int)] == [1, 2, 4, 5, 7, 8]
        assert [type(result) for result in results][::3] == [ZeroDivisionError] * 4
        assert ended == list(range(10))
        worker.stop(patience_s=30)

    run(test)


def test_a_thread_that_dies_in_a_job_fails_its_jobs_and_is_replaced() -> None:
    async def test() -> None:
        deaths: list[int] = []
        worker = Worker("mortal", lambda: deaths.append(1))
        first = thread_of("mortal")
        doomed, queued = worker.run(die), worker.run(lambda: 2)
        for future in (doomed, queued):
            with pytest.raises(WorkerDied, match="the thread mortal died"):
                await future
        assert await worker.run(lambda: 3) == 3
        first.join()
        assert thread_of("mortal") is not first
        assert len(deaths) == 1
        worker.stop(patience_s=30)

    run(test)


def test_a_thread_that_is_killed_between_jobs_is_replaced_at_the_next() -> None:
    async def test() -> None:
        worker = Worker("idle")
        assert await worker.run(lambda: 1) == 1
        kill(thread_of("idle"))
        with pytest.raises(WorkerDied):
            await worker.run(lambda: 2)
        assert await worker.run(lambda: 3) == 3
        worker.stop(patience_s=30)

    run(test)


def test_a_job_whose_waiter_has_gone_disturbs_nobody() -> None:
    async def test() -> None:
        worker = Worker("left")
        go = threading.Event()
        gone = worker.run(lambda: go.wait(10))
        gone.cancel()
        after = worker.run(lambda: 2)
        go.set()
        assert await after == 2
        worker.stop(patience_s=30)

    run(test)


def test_an_idle_thread_holds_on_to_no_job() -> None:
    """The job of a replaced model kept its session in memory until another job came."""

    class Held:
        pass

    async def test() -> None:
        worker = Worker("forgetful")
        held = Held()
        watch = weakref.ref(held)
        await worker.run(lambda held=held: bool(held))
        del held
        await asyncio.to_thread(kept_by_nobody, watch)
        worker.stop(patience_s=30)

    def kept_by_nobody(watch: weakref.ref[Held]) -> None:
        done = threading.Event()
        weakref.finalize(watch(), done.set) if watch() is not None else done.set()
        gc.collect()
        assert done.wait(10)

    run(test)


@pytest.mark.parametrize("dead", [False, True])
def test_stop_ends_the_thread_even_if_it_has_just_died(dead: bool) -> None:
    async def test() -> None:
        worker = Worker("stopped")
        if dead:
            doomed = worker.run(die)
            thread_of("stopped").join()
            worker.stop(patience_s=30)
            with pytest.raises(WorkerDied):
                await doomed
        else:
            last = worker.run(lambda: 1)
            await asyncio.to_thread(worker.stop, 30)
            assert await last == 1
        assert not [thread for thread in threading.enumerate() if thread.name == "stopped"]

    run(test)


def test_a_job_that_ends_when_nobody_waits_any_more_leaves_no_traceback() -> None:
    """A server that did not wait for a hung run ended with one."""
    go, failures = threading.Event(), []

    async def test() -> threading.Thread:
        worker = Worker("late")
        thread = thread_of("late")
        worker.run(go.wait)
        worker.stop(patience_s=0)
        return thread

    thread = asyncio.run(test())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", failures.append)
        go.set()
        thread.join(30)
    assert not thread.is_alive()
    assert not failures
