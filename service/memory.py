"""What models cost in memory: measured on the process while they are loaded, and counted from what they are made of."""

from __future__ import annotations

from pathlib import Path

PARAMETER_BYTES = 4
"""Weights are FP32."""

_SMAPS = Path("/proc/self/smaps_rollup")


def resident_bytes() -> int | None:
    """The proportional set size of this process: its pages in memory, shared ones by its share. None where the system
    does not tell (it takes Linux 4.14)."""
    try:
        lines = _SMAPS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), None)


def grown_bytes(since: int | None) -> int | None:
    """What the process has grown by since `resident_bytes` was `since`; negative if it has shrunk."""
    now = resident_bytes()
    return None if since is None or now is None else now - since
