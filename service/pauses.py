"""Pauses by Python's garbage collection: kept short, and measured where they happen."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_THRESHOLDS = 700, 20, 1000
"""Python's own are 700, 10, 10, and after `gc.freeze` next to nothing is old, so that full collections were frequent: of
whatever is in flight, which in an overload took 50 ms and more, and made the overload worse. Requests leave no cycles,
errors do: what a young collection has passed on of them is found by one of the middle generation, after 20 young ones.
(After 700, it had grown to 60 MB by then, and took 50 ms in an overload as well.)"""


def shorten_pauses() -> None:
    """To be called when start-up is over: what it left is never garbage, and is not walked while requests wait."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)


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
