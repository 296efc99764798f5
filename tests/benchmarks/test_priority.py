from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.priority import first_in_line


@pytest.mark.skipif(sys.platform != "linux", reason="real-time scheduling by this name is Linux's")
def test_priority_is_given_back_and_not_inherited_by_servers() -> None:
    """Where it is not permitted nothing changes, which is what the first and the last line check as well."""
    before = os.sched_getscheduler(0)
    show = [sys.executable, "-c", "import os; print(os.sched_getscheduler(0))"]
    with first_in_line() as permitted:
        now = os.sched_getscheduler(0)
        assert (now & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO) == permitted
        assert int(subprocess.check_output(show)) == os.SCHED_OTHER
    assert os.sched_getscheduler(0) == before
