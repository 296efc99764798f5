from __future__ import annotations

import gc

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


def test_what_is_in_flight_is_not_walked_again_and_again_after_start_up() -> None:
    thresholds, generations = gc.get_threshold(), []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            generations.append(info["generation"])

    shorten_pauses()
    gc.callbacks.append(note)
    try:
        in_flight = [[number] for number in range(200_000)]
        assert len(in_flight) == 200_000
        assert generations  # young garbage is still found
        assert set(generations) == {0}  # Python's own thresholds: some are of all objects
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*thresholds)
        gc.unfreeze()
