"""Where gRPC calls wait for the event loop, in a crowd: what `service.gate` is for HTTP, by the turns that gRPC's library
takes. Knows nothing of the library.

It takes one new call in a turn of the loop, and tells nobody how many wait for that. A loop that is busy with the calls it
has begun hardly sees a crowd: it runs batches of one, and all wait where nobody looks at their budgets. So once there are a
few, none begins before the loop has had some turns that brought nobody new. Whoever is late by then is refused unread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from service.gate import AT_ONCE, Line, Pace, late

_AT_A_TIME = 16
"""How many begin together, once nobody new comes."""

_JUDGED_AT_A_TIME = 64
"""Refusals take time, too, which those who begin with them wait for."""

_QUIET_TURNS = 10
"""A new call shows some turns after the one before: a thread of the library's fetches it meanwhile."""

_LONGEST_S = 0.02
"""Where somebody new comes all the time, the others begin nevertheless, after so long."""

_UNSEEN = 0.75
"""Of the time since nobody waited to be taken, the share that a call which is taken now is thought to have waited for."""

_LONGEST_UNSEEN_S = 0.1
"""Of that time, the most that counts: where somebody new comes all the time, it only grows."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    arrived_s: float
    budget_s: Callable[[], float | None]
    begins: asyncio.Future[bool]  # false: it would be late

    def asks(self) -> tuple[float, float | None]:
        """When it came, and its budget. It ends if that cannot be read; the others go on."""
        if not self.begins.done():
            try:
                return self.arrived_s, self.budget_s()
            except Exception as exc:  # noqa: BLE001 - the call's own
                self.begins.set_exception(exc)
        return self.arrived_s, None


class CallGate:
    """Lets calls begin, some at a time. Used on one event loop."""

    def __init__(self) -> None:
        self.pace = Pace()
        """To be told of answers."""
        self._line = Line[_Waiting](self.pace, _Waiting.asks)
        self._here = 0  # begun or waiting
        self._watches = False  # turns of the loop, for somebody new
        self._quiet_turns = 0
        self._quiet_s = 0.0  # when nobody waited to be taken, as far as is known
        self._round_s = 0.0  # since when those who wait let others come first

    def waiting(self) -> int:
        """How many wait; the first few, and those that come when there are few, never do."""
        return len(self._line)

    def came_s(self, now_s: float) -> float:
        """When a call that is taken now is thought to have come."""
        if not self._watches:
            return now_s
        return now_s - _UNSEEN * min(now_s - self._quiet_s, _LONGEST_UNSEEN_S)

    async def enter(self, arrived_s: float, budget_s: Callable[[], float | None]) -> None:
        """Returns when it is the turn of a call that came at `arrived_s`, which is to `leave` when it has ended. `budget_s`
        tells its budget, if any, and is called only where that matters.

        Raises:
            DeadlineExpired: it would be late.
        """
        self._here += 1
        self._quiet_turns = 0
        loop = asyncio.get_running_loop()
        if self._here >= AT_ONCE and not self._watches:
            self._watches = True
            self._quiet_s = self._round_s = time.monotonic()
            loop.call_soon(self._next_turn)
        if self._here <= AT_ONCE:
            return
        call = _Waiting(arrived_s, budget_s, loop.create_future())
        self._line.append(call)
        begins = False
        try:
            begins = await call.begins
        finally:
            if not begins:
                self.leave()
        if not begins:
            raise late(arrived_s)

    def leave(self) -> None:
        """A call that began has ended."""
        self._here -= 1

    def _next_turn(self) -> None:
        """Of the loop, of all until so many have brought nobody new and nobody waits."""
        self._quiet_turns += 1
        quiet = self._quiet_turns >= _QUIET_TURNS
        if quiet and not self._line:
            self._watches = False
            return
        asyncio.get_running_loop().call_soon(self._next_turn)
        now_s = time.monotonic()
        if quiet or now_s >= self._round_s + _LONGEST_S:
            if quiet:
                self._quiet_s = now_s
            self._round_s, self._quiet_turns = now_s, 0
            self._begin_some(now_s)

    def _begin_some(self, now_s: float) -> None:
        begun = judged = 0
        while self._line and begun < _AT_A_TIME and judged < _JUDGED_AT_A_TIME:
            call, would_be_late = self._line.next(now_s)
            if call.begins.done():  # its client has gone
                continue
            judged += 1
            call.begins.set_result(not would_be_late)
            begun += not would_be_late
