from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from service import pauses
from service.pauses import collect_when_idle, shorten_pauses, watch_pauses


def test_every_collection_is_timed_while_it_is_watched() -> None:
    seconds: list[float] = []
    with watch_pauses(seconds.append):
        gc.collect()
        assert seconds
        assert min(seconds) >= 0
    counted = len(seconds)
    gc.collect()
    assert len(seconds) == counted


@pytest.fixture
def shortened() -> Iterator[None]:
    thresholds = gc.get_threshold()
    shorten_pauses()
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()


@pytest.mark.usefixtures("shortened")
def test_what_is_in_flight_is_not_walked_again_and_again_after_start_up() -> None:
    generations = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            generations.append(info["generation"])

    gc.callbacks.append(note)
    try:
        in_flight = [[number] for number in range(200_000)]
        assert len(in_flight) == 200_000
        assert 0 in generations  # young garbage is still found
        assert 2 not in generations  # Python's own thresholds: some are of all objects
    finally:
        gc.callbacks.remove(note)


class Left:
    """What an error leaves: found by nobody but the garbage collector."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.usefixtures("shortened")
def test_what_errors_leave_is_found_as_soon_as_nothing_is_in_flight() -> None:
    """Even if a collection came between."""
    idle = False

    async def serve() -> None:
        nonlocal idle
        collecting = asyncio.create_task(collect_when_idle(lambda: idle))
        left = [Left() for _ in range(1000)]
        gone = [weakref.ref(each) for each in left]
        gc.collect(0)
        del left
        await asyncio.sleep(0.2)
        assert all(each() is not None for each in gone)
        idle = True
        async with asyncio.timeout(20):
            while any(each() is not None for each in gone):
                await asyncio.sleep(0.01)
        collecting.cancel()

    asyncio.run(serve())


@pytest.mark.usefixtures("shortened")
def test_what_was_in_use_when_it_was_collected_is_found_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pauses, "_EVERY_S", 0.001)
    monkeypatch.setattr(pauses, "_WHOLE_EVERY", 3)

    async def serve() -> None:
        collecting = asyncio.create_task(collect_when_idle(lambda: True))
        left = [Left()]
        gone = weakref.ref(left[0])
        gc.collect(1)  # it is old now
        del left
        in_flight = []
        async with asyncio.timeout(20):
            while gone() is not None:
                in_flight += [[number] for number in range(1000)]
                await asyncio.sleep(0.005)
        collecting.cancel()

    asyncio.run(serve())


@pytest.mark.usefixtures("shortened")
def test_where_something_is_always_in_flight_it_is_found_too() -> None:
    """It once grew to 60 MB."""
    gone = weakref.ref(Left())
    in_flight: list[list[int]] = []
    while gone() is not None and len(in_flight) < 200_000:
        in_flight.append([0])
    assert gone() is None
