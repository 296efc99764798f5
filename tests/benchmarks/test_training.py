from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.training import BP, LEVEL, MODELS, NODE, WAYS, Bench, main, span_of
from training.config import ResMlpConfig


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_the_span_of_a_step_is_counted(depth: int) -> None:
    """2(N-1)+2 for backpropagation, 4D for HBLL; and a level need not wait for the weight gradients of the one above."""
    n = 2**depth
    assert span_of(depth, BP) == (2 * n, 2 * n)
    assert span_of(depth, LEVEL) == (4 * depth, 3 * depth + 1)
    # One at a time, the four evaluations of a node come after those of the node before, but for what the head does.
    assert span_of(depth, NODE) == (4 * (n - 1), 3 * depth + 1)


def test_peak_memory_counts_what_is_held_for_backward() -> None:
    """Twice the blocks hold about twice the activations for BP; node by node, HBLL holds little but the states."""
    peaks = {
        (depth, way): Bench(ResMlpConfig(width=32, hidden=64), 64, depth, torch.device("cpu")).peak_bytes(way)
        for depth in (4, 5)
        for way in (BP, NODE)
    }
    state = 64 * 32 * 4
    assert peaks[5, BP] > 1.7 * peaks[4, BP] > 1.7 * 15 * 3 * state  # a block keeps its input, and two of hidden size
    growth = peaks[5, NODE] - peaks[4, NODE]
    assert 16 * state * 0.9 < growth < 16 * state * 1.5


@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_a_step_in_every_way(name: str) -> None:
    config, batch = MODELS[name]
    bench = Bench(config, batch, 2, torch.device("cpu"))
    assert all(bench.peak_bytes(way) > 0 for way in WAYS)


def test_the_command_writes_its_report(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--depths", "2", "--models", "narrow residual MLP", "--rounds", "2"]
    done = CliRunner().invoke(main, [*arguments, "--machine", "a test"])
    assert done.exit_code == 0, done.output
    with (tmp_path / "training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["way"], row["blocks"], row["span"]) for row in rows] == [
        (BP, "3", "8"),
        (NODE, "3", "12"),
        (LEVEL, "3", "8"),
    ]
    assert all(float(row["step_s"]) > 0 and int(row["peak_bytes"]) > 0 for row in rows)
    assert "On a test, one thread's CPU time." in (tmp_path / "training.md").read_text()
    assert (tmp_path / "training.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("depths", ["0", "9", "three"])
def test_impossible_depths_are_refused(tmp_path: Path, depths: str) -> None:
    done = CliRunner().invoke(main, ["--out", str(tmp_path), "--depths", depths])
    assert done.exit_code == 2
    assert "--depths" in done.output
