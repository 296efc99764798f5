from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.training import published
from training.data_config import ArraysConfig
from training.dataset import Dataset
from training.sources import load_data

publish = published.publish


@pytest.fixture
def blobs(tmp_path: Path) -> Dataset:
    """Three classes of 60 rows of four numbers each, far enough apart to be learnt at once."""
    rng = np.random.default_rng(0)
    y = np.repeat(["low", "mid", "top"], 60)
    x = rng.standard_normal((180, 4)) + 5 * np.repeat(np.eye(4)[:3], 60, axis=0)
    np.savez(tmp_path / "blobs.npz", x=100 + 10 * x, y=y)
    return load_data(ArraysConfig(file=tmp_path / "blobs.npz"))
