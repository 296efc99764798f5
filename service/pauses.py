"""Pauses by Python's garbage collection: kept short, and measured where they happen."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_THRESHOLDS = 50_000, 20, 1000
"""Python's own are 700, 10, 10: in an overload they took a tenth of the time, to walk whatever is in flight again and
again, and find nothing. Requests leave no cycles, answered or refused; what else does is found when nothing is in flight
(`collect_when_idle`), and if that never comes, after so many objects. Next to nothing is old after `gc.freeze`, so that
full collections would be frequent, too."""

_EVERY_S = 0.05
_FEW = 700  # objects that are not worth it
_WHOLE_EVERY = 50  # collections; what was still in use when one came is found by these


def shorten_pauses() -> None:
    """To be called when start-up is over: what it left is never garbage, and is not walked while requests wait."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)


async def collect_when_idle(is_idle: Callable[[], bool]) -> None:
    """Collect what has come up whenever nothing is in flight, for ever. It is walked in no time then."""
    collections = 0
    while True:
        await asyncio.sleep(_EVERY_S)
        young, middle, _ = gc.get_count()
        if (young > _FEW or middle) and is_idle():
            collections += 1
            gc.collect(1 if collections % _WHOLE_EVERY else 2)


@contextmanager
def watch_pauses(observe: Callable[[float], None]) -> Iterator[None]:
    """Tell `observe` the seconds of every collection."""
    began_s = 0.0

    def on_collection(phase: str, _: dict[str, int]) -> None:
        nonlocal began_s
        if phase == "start":
            began_s = time.perf_counter()
        else:
            observe(time.perf_counter() - began_s)

    gc.callbacks.append(on_collection)
    try:
        yield
    finally:
        gc.callbacks.remove(on_collection)
