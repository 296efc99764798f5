"""`hbll`, with signals that do to it what should not happen: SIGUSR1 kills the inference thread, from SIGUSR2 on every run
hangs. For `benchmarks.faults` and tests, which run it as a process."""

from __future__ import annotations

import ctypes
import signal
import threading

from hbll.cli import main
from service import engine
from service.dispatch import Dispatch


def _kill_inference(*_: object) -> None:
    """Raise SystemExit in the thread, at its next instruction."""
    for thread in threading.enumerate():
        if thread.name == "inference" and thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


def _hang_runs(*_: object) -> None:
    """In the inference thread, as a deadlock in the runtime would."""
    engine._ON_LOOP_S = 0.0
    Dispatch.infer = lambda *_: threading.Event().wait()  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _kill_inference)
    signal.signal(signal.SIGUSR2, _hang_runs)
    main()
