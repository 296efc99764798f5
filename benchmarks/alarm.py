"""Waking an asyncio loop to within some 0.05 ms.

The loops' own timers count in whole milliseconds: asyncio's fire up to one late, uvloop's half of one early or late,
which is too coarse for thousands of arrivals a second. Linux has timers of nanoseconds that a loop can wait for as for a
socket (timerfd_create(2); `os` has them from Python 3.13 on). Elsewhere the loop's timers must do.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
import sys
import time

_CLOCK_MONOTONIC = 1
_ABSOLUTE = 1  # TFD_TIMER_ABSTIME


class Alarm:
    """Wakes one task of the running loop at a time, on the clock of `time.monotonic`. Close it after use."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken: asyncio.Future[None] | None = None
        self._timer: int | None = None
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            timer: int = self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
            if timer < 0:
                raise OSError(ctypes.get_errno(), "timerfd_create failed")
            self._timer = timer
            self._loop.add_reader(timer, self._ring)

    async def until(self, time_s: float) -> None:
        """Sleep until `time_s`; not at all if it has passed."""
        if self._timer is None:
            while (left_s := time_s - time.monotonic()) > 0:  # noqa: ASYNC110  a loop's timer may be early
                await asyncio.sleep(left_s)
            return
        if time_s <= time.monotonic():
            return
        self._woken = self._loop.create_future()
        seconds, fraction = divmod(time_s, 1.0)
        once = struct.pack("@llll", 0, 0, int(seconds), int(fraction * 1e9))  # struct itimerspec: no interval, the time
        if self._libc.timerfd_settime(self._timer, _ABSOLUTE, once, None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")
        await self._woken

    def close(self) -> None:
        """Give the timer back."""
        if self._timer is not None:
            self._loop.remove_reader(self._timer)
            os.close(self._timer)
            self._timer = None

    def _ring(self) -> None:
        assert self._timer is not None
        try:
            os.read(self._timer, 8)  # how often it expired: it must be read to be set again
        except BlockingIOError:
            return  # set anew after it had expired
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)
