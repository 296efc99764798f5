from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_the_command_line_and_all_packages(tmp_path: Path) -> None:
    """An editable install hides what a wheel lacks: the command line was missing once."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"hbll/cli.py", "family/tree.py", "training/configs/digits.toml", "export/graph.py", "service/app.py"} <= names
    assert {f"{package}/py.typed" for package in ("family", "training", "export", "service", "benchmarks", "hbll")} <= names
    assert {"service/oip/rpc/stubs/open_inference.proto", "service/oip/rpc/stubs/open_inference_pb2.py"} <= names
    assert not any(name.startswith(("tests/", "runs/", "models/")) for name in names)
