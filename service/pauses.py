"""Pauses by Python's garbage collection, measured where they happen."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
