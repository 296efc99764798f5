from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.machine import kept_machine
from family.manifest import load_manifest
from service.profile import Segment
from tests.conftest import Trained


def test_what_was_measured_once_is_what_is_simulated_from_then_on(trained: Trained, tmp_path: Path) -> None:
    file, manifest = tmp_path / "machine.json", load_manifest(trained.bundle)
    measured = kept_machine(file, trained.bundle, manifest)
    kept = kept_machine(file, trained.bundle, manifest)
    assert kept == measured
    shallowest = Segment(manifest.front[0], embed=True)
    for rows, ratio in zip(kept.parts.batches, kept.ratios, strict=True):
        profile = kept.profile(shallowest)
        assert profile.latency_s(shallowest, rows) == pytest.approx(ratio * profile.typical_s(shallowest, rows))


@pytest.mark.parametrize("content", ["", "{}", '{"parts": 3, "ratios": []}'])
def test_another_file_is_refused(trained: Trained, tmp_path: Path, content: str) -> None:
    file = tmp_path / "machine.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="expected what an earlier call with --profile wrote"):
        kept_machine(file, trained.bundle, load_manifest(trained.bundle))
    assert file.read_text() == content
