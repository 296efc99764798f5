from __future__ import annotations

import asyncio
import sys
import time

import pytest
import uvloop

from benchmarks.alarm import Alarm


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def runner(request: pytest.FixtureRequest):
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield runner


@pytest.fixture(params=["timerfd", "the loop's timers"])
def timers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "timerfd":
        monkeypatch.setattr(sys, "platform", "darwin")


@pytest.mark.usefixtures("timers")
def test_it_never_wakes_early_and_lets_others_run(runner: asyncio.Runner) -> None:
    """uvloop's own timers do wake early, by up to half a millisecond."""

    async def main() -> None:
        alarm = Alarm()
        ran = asyncio.get_running_loop().create_task(asyncio.sleep(0, "others"))
        for _ in range(100):
            time_s = time.monotonic() + 0.0007
            await alarm.until(time_s)
            assert time.monotonic() >= time_s
        assert ran.done()
        alarm.close()

    runner.run(main())


@pytest.mark.usefixtures("timers")
def test_a_time_that_has_passed_is_not_waited_for(runner: asyncio.Runner) -> None:
    async def main() -> None:
        alarm = Alarm()
        waiting = alarm.until(time.monotonic() - 1.0)
        with pytest.raises(StopIteration):
            waiting.send(None)
        alarm.close()

    runner.run(main())


def test_a_sleep_that_was_cancelled_does_not_end_the_next(runner: asyncio.Runner) -> None:
    async def main() -> None:
        alarm = Alarm()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(alarm.until(time.monotonic() + 0.05), 0.001)
        time_s = time.monotonic() + 0.1
        await alarm.until(time_s)
        assert time.monotonic() >= time_s
        alarm.close()
        alarm.close()  # does no harm

    runner.run(main())
