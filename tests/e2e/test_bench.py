"""`hbll bench`: real servers, a real load, and what is left of it when it is stopped."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

from tests.conftest import Trained, wait_for

COMMAND = [sys.executable, "-m", "hbll", "bench"]
FEW = ["--policies", "ladder-edf,aimd(4)", "--cells", "1", "--capacity", "500", "--requests", "100", "--tries", "1"]


def read(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_policies_get_the_same_requests_in_turn_and_what_was_measured_is_kept(trained: Trained, tmp_path: Path) -> None:
    """Bug found: one that was stopped after ten minutes had nothing of them."""
    file = tmp_path / "bench.csv"
    command = [*COMMAND, str(trained.models), *FEW, "--seeds", "1000", "--out", str(tmp_path)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, as do theirs
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        wait_for(lambda: len(read(file)) >= 4 or process.poll() is not None, patience_s=180)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    rows = read(file)
    assert f"stopped after {len(rows)} of 2000 replays" in output
    assert f"{sum(int(row['requests']) for row in rows):,} requests, " in output
    policies = ["ladder-edf", "aimd(4)", "aimd(4)", "ladder-edf"]
    assert [(row["policy"], row["seed"]) for row in rows[:4]] == list(zip(policies, "0011", strict=True))
    assert rows[0]["requests"] == rows[1]["requests"]
    assert all(1 >= float(row["attainment"]) >= float(row["goodput"]) > 0 for row in rows[:4])
    assert {float(row["depth"]) for row in rows[:4] if row["policy"] == "aimd(4)"} == {1.0}
    about = json.loads((tmp_path / "bench.json").read_text())
    assert (about["capacity"], set(about["gc_pauses"])) == (500, {"ladder-edf", "aimd(4)"})
