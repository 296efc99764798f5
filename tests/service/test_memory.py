from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from service import memory

linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not tell")


@linux
def test_what_the_process_holds_more_is_what_it_has_grown_by() -> None:
    before = memory.resident_bytes()
    held = np.ones(16 * 1024 * 1024)
    grown = memory.grown_bytes(before)
    assert grown is not None
    assert grown == pytest.approx(held.nbytes, rel=0.05)


def test_where_the_system_does_not_tell_nothing_is_made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_SMAPS", tmp_path / "none")
    assert memory.resident_bytes() is None
    assert memory.grown_bytes(None) is None
    assert memory.grown_bytes(5) is None
