"""`hbll`, with a signal that kills the inference thread: for `benchmarks.faults`, which runs it as a process."""

from __future__ import annotations

import ctypes
import signal
import threading

from hbll.cli import main


def _kill_inference(*_: object) -> None:
    """Raise SystemExit in the thread, at its next instruction."""
    for thread in threading.enumerate():
        if thread.name == "inference" and thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _kill_inference)
    main()
