"""Where requests wait for a thread that decodes their inputs, if that takes long: pictures, many rows.

More threads than processors get no more done. Whoever waits for one has been read,
which `service.gate` counts as begun; so here is a line once more, and whoever would be late is refused before the work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.concurrency import run_in_threadpool

from service.gate import Line, Pace, late

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Waiting:
    arrived_s: float
    budget_s: float | None
    begins: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def asks(self) -> tuple[float, float | None]:
        """When the request came, and its budget."""
        return self.arrived_s, self.budget_s


class Decoding:
    """Lets `at_once` decode at a time. Used on one event loop.

    `pace` is to be told of answers, from when their inputs began to be decoded.
    """

    def __init__(self, at_once: int) -> None:
        self.pace = Pace()
        self._at_once = at_once
        self._line = Line[_Waiting](self.pace, _Waiting.asks)
        self._busy = 0

    def waiting(self) -> int:
        """How many wait."""
        return len(self._line)

    async def run(self, decode: Callable[[], T], arrived_s: float, budget_s: float | None) -> tuple[T, float]:
        """What `decode` returns, for a request that came at `arrived_s`, and when it began, both on the monotonic clock.

        Raises:
            DeadlineExpired: the request would be late.
        """
        if self._busy < self._at_once:
            self._busy += 1
        else:
            await self._turn(_Waiting(arrived_s, budget_s))
        begun_s = time.monotonic()
        try:
            return await run_in_threadpool(decode), begun_s
        finally:
            self._pass_on()

    async def _turn(self, request: _Waiting) -> None:
        self._line.append(request)
        try:
            begins = await request.begins
        except asyncio.CancelledError:
            if not request.begins.cancelled() and request.begins.result():  # its client went when its turn had come
                self._pass_on()
            raise
        if not begins:
            raise late(request.arrived_s)

    def _pass_on(self) -> None:
        """A thread is free: for the next, if anybody waits."""
        now_s = time.monotonic()
        while self._line:
            request, would_be_late = self._line.next(now_s)
            if request.begins.done():  # its client has gone
                continue
            request.begins.set_result(not would_be_late)
            if not would_be_late:
                return
        self._busy -= 1
