from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from service.pauses import shorten_pauses, watch_pauses


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


@pytest.mark.usefixtures("shortened")
def test_what_errors_leave_is_found_soon_even_if_a_collection_came_between() -> None:
    """It once grew to 60 MB."""

    class Left:
        pass

    left = Left()
    left.itself = left  # type: ignore[attr-defined]
    gone = weakref.ref(left)
    gc.collect(0)
    del left
    in_flight = []
    while gone() is not None and len(in_flight) < 50_000:
        in_flight.append([0])
    assert gone() is None
