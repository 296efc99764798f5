"""`hbll predict`: what it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from hbll.client import Answer, Prediction, Rung
from hbll.predict import _show, _show_rung

ROW = Prediction(label="[/b]", confidence=0.9, depth=1, path="4", stopped_by="complete")


def test_labels_and_file_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug found: rich took brackets in them for its markup, which ended the command or swallowed them."""
    image = Path("a[red].png")
    times = {"queue_ms": 0.1, "compute_ms": 0.2, "total_ms": 0.4, "elapsed_ms": 0.5}
    answer = Answer(
        model="m", version=1, predictions=(ROW,), deadline_met=None, risk=None, requests=1, request_id="", **times
    )
    _show((image,), answer)
    _show_rung(image, Rung(row=0, final=True, total_ms=0.4, prediction=ROW))
    shown = capsys.readouterr().out
    assert shown.count("[/b]") == shown.count("a[red].png") == 2
