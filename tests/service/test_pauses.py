from __future__ import annotations

import gc

from service.pauses import watch_pauses


def test_every_collection_is_timed_while_it_is_watched() -> None:
    seconds: list[float] = []
    with watch_pauses(seconds.append):
        gc.collect()
        assert seconds
        assert min(seconds) >= 0
    counted = len(seconds)
    gc.collect()
    assert len(seconds) == counted
