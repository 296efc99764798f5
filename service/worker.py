"""The inference thread: runs jobs one after another, off the event loop, and is missed when it dies."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")

_Jobs: TypeAlias = "SimpleQueue[tuple[Callable[[], object], asyncio.Future[Any]] | None]"

logger = logging.getLogger(__name__)


class WorkerDied(Exception):
    """The thread ended before the job did."""


class Worker:
    """One thread and its jobs. Everything but the jobs happens on the event loop that made it.

    The thread that is left after a death is a new one: `WorkerDied` tells only whose job went with the old. Every death
    is told to `on_death` first.
    """

    def __init__(self, name: str, on_death: Callable[[], object] = lambda: None) -> None:
        self._name = name
        self._on_death = on_death
        self._stopped = False
        self._loop = asyncio.get_running_loop()
        self._futures: set[asyncio.Future[Any]] = set()
        self._start()

    def run(self, job: Callable[[], T]) -> asyncio.Future[T]:
        """The result of `job` or its exception, later; `WorkerDied` if the thread ended before."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        self._jobs.put((job, future))
        return future

    def stop(self, patience_s: float) -> None:
        """End the thread after the jobs that it has. Waits for it, at most so long: the process does not."""
        self._stopped = True
        self._jobs.put(None)
        self._thread.join(patience_s)

    def _start(self) -> None:
        self._jobs: _Jobs = SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(self._jobs,), name=self._name, daemon=True)
        self._thread.start()

    def _work(self, jobs: _Jobs) -> None:
        asked_to = False
        try:
            while self._work_once(jobs):
                pass
            asked_to = True
        finally:
            if not asked_to:
                self._tell(self._died)

    def _work_once(self, jobs: _Jobs) -> bool:
        """Do the next job; false if there is to be none. Of its own, so that an idle thread holds on to no job."""
        item = jobs.get()
        if item is None:
            return False
        job, future = item
        try:
            result = job()
        except Exception as exc:  # noqa: BLE001 (whoever awaits the future handles it)
            self._tell(_settle, future, None, exc)
        else:
            self._tell(_settle, future, result, None)
        return True

    def _tell(self, callback: Callable[..., object], *args: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(callback, *args)

    def _died(self) -> None:
        self._on_death()
        if not self._stopped:
            logger.error("the thread %s died; a new one takes its place", self._name)
            self._start()
        for future in list(self._futures):
            _settle(future, None, WorkerDied(f"the thread {self._name} died"))


def _settle(future: asyncio.Future[object], result: object, error: Exception | None) -> None:
    if future.done():  # cancelled meanwhile
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
