"""`Client`: `AsyncClient` for code that is not asynchronous.

It runs one in an event loop of its own, in a thread: so there is one implementation of everything, a deadline that holds
for all of a call (httpx alone bounds each of its steps), hedging, and one client for any number of threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Self, TypeVar, Unpack

import anyio
from anyio.from_thread import BlockingPortal

from hbll.client.aio import DEFAULT_URL, AsyncClient, ClientOptions
from hbll.client.answers import Answer, Model, ModelDetail, Plan, Readiness, Rung
from hbll.client.inputs import Inputs
from hbll.client.requests import PredictOptions, StreamOptions, Wishes

T = TypeVar("T")


class Client:
    """Asks a server; for any number of threads at once. Arguments, methods and errors are those of `AsyncClient`.

    Close it, or use it in `with`. A process that was forked must make one of its own.
    """

    def __init__(self, base_url: str = DEFAULT_URL, **options: Unpack[ClientOptions]) -> None:
        self._client = AsyncClient(base_url, **options)
        self._pid = os.getpid()
        self._closed = False
        self._exit = ExitStack()
        self._portal, self._thread = _start_loop()
        self._exit.callback(self._thread.join)
        self._exit.callback(lambda: self._portal.call(self._portal.stop))
        self._exit.callback(lambda: self._portal.call(self._client.aclose))

    def predict(self, inputs: Inputs, *, model: str | None = None, **options: Unpack[PredictOptions]) -> Answer:
        """See `AsyncClient.predict`."""
        return self._run(partial(self._client.predict, inputs, model=model, **options))

    def stream(
        self, inputs: Inputs, *, model: str | None = None, **options: Unpack[StreamOptions]
    ) -> Generator[Rung | Answer]:
        """See `AsyncClient.stream`; here it is `contextlib.closing`, or leaving the loop, that stops the server's work."""
        events = self._client.stream(inputs, model=model, **options)
        while (event := self._run(partial(_next, events))) is not None:  # what that raises, an interrupt too, has ended it
            try:
                yield event
            except BaseException:
                if not self._closed and os.getpid() == self._pid:  # else it ended with its event loop, or is another's
                    self._run(events.aclose)
                raise

    def plan(
        self, model: str | None = None, *, version: int | None = None, rows: int = 1, **wishes: Unpack[Wishes]
    ) -> Plan:
        """See `AsyncClient.plan`."""
        return self._run(partial(self._client.plan, model, version=version, rows=rows, **wishes))

    def models(self) -> tuple[Model, ...]:
        """See `AsyncClient.models`."""
        return self._run(self._client.models)

    def model(self, name: str, *, version: int | None = None) -> ModelDetail:
        """See `AsyncClient.model`."""
        return self._run(partial(self._client.model, name, version=version))

    def ready(self) -> Readiness:
        """See `AsyncClient.ready`."""
        return self._run(self._client.ready)

    def close(self) -> None:
        """Close all connections and end the thread; calls that other threads are making end with a RuntimeError."""
        self._closed = True
        if os.getpid() == self._pid:  # in a forked process there is no thread to wait for
            self._exit.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, work: Callable[[], Awaitable[T]]) -> T:
        if os.getpid() != self._pid:  # its thread is not here, and nobody would ever answer
            raise RuntimeError("this client was made before the process was forked: make one in each process")
        if self._closed:
            raise RuntimeError("this client is closed")
        future = self._portal.start_task_soon(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # of an interrupt, such as Ctrl-C: the request ends too
            raise


async def _next(events: AsyncGenerator[T]) -> T | None:
    return await anext(events, None)


def _start_loop() -> tuple[BlockingPortal, threading.Thread]:
    """An event loop, as anyio's `start_blocking_portal`, but in a thread that does not keep the interpreter from its end: a
    program that fails before it closes its client is to say why, and not to hang."""
    started: Future[BlockingPortal] = Future()

    async def serve() -> None:
        async with BlockingPortal() as portal:
            started.set_result(portal)
            await portal.sleep_until_stopped()

    def run() -> None:
        try:
            anyio.run(serve)
        except BaseException as exc:
            if started.done():
                raise
            started.set_exception(exc)

    thread = threading.Thread(target=run, name="hbll-client", daemon=True)
    thread.start()
    return started.result(), thread
