"""A processor whenever one is wanted, for a client that must send in time beside the servers that it loads."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PRIORITY = 10  # any real-time priority comes before all ordinary processes


@contextmanager
def first_in_line() -> Iterator[bool]:
    """Run this process under Linux's real-time policy SCHED_FIFO; false where the system does not permit that (it wants
    root, CAP_SYS_NICE or RLIMIT_RTPRIO). A client sleeps most of the time, so it takes from the servers what it uses and
    no more; without this, a machine whose cores are all busy lets it wait for milliseconds, and it measures itself.
    """
    if sys.platform != "linux":
        yield False
        return
    before, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(_PRIORITY))
    except PermissionError:
        yield False
        return
    try:
        yield True
    finally:
        os.sched_setscheduler(0, before, parameters)
