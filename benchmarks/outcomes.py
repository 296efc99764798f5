"""What a bundle answers to the test digits at every path that a policy may stop at: recorded once, played back often."""

from __future__ import annotations

import re
from pathlib import Path as FilePath

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from benchmarks.simulation import Outcomes
from family.manifest import Manifest
from family.tree import Path
from service.runtime import Runtime
from training.dataset import Split
from training.digits import load_digits

_BATCH = 32


def digits_of(manifest: Manifest) -> Split:
    """The test split that the bundle's family was measured on.

    Raises:
        ValueError: it was trained on something else.
    """
    match = re.fullmatch(r"digits, shift ([0-9]+)", manifest.provenance.dataset)
    if match is None:
        raise ValueError(f"expected a bundle trained on the embedded digits, got {manifest.provenance.dataset!r}")
    return load_digits(shift=int(match[1])).test


def record(bundle: FilePath, manifest: Manifest, test: Split) -> Outcomes:
    """The calibrated confidence and the correctness of every path of the climb and the front."""
    labels: NDArray[np.int64] = test.labels.numpy()
    confidence: dict[Path, list[float]] = {}
    right: dict[Path, list[bool]] = {}
    for path in dict.fromkeys((*manifest.climb, *manifest.front)):
        probabilities = probabilities_of(bundle, manifest, path, test)
        confidence[path] = probabilities.max(axis=1).tolist()
        right[path] = (probabilities.argmax(axis=1) == labels).tolist()
    return Outcomes(confidence, right)


def probabilities_of(bundle: FilePath, manifest: Manifest, path: Path, test: Split) -> NDArray[np.float64]:
    """What a path says to all images, `(rows, classes)`, calibrated; on one thread."""
    runtime = Runtime(bundle, manifest, threads=1, device="cpu")
    x: NDArray[np.float32] = test.x.numpy()
    parts = []
    for start in range(0, len(x), _BATCH):
        logits = runtime.run(path, x[start : start + _BATCH], embed=True).logits
        assert logits is not None
        parts.append(softmax(logits.astype(np.float64) / manifest.offered[path].temperature, axis=1))
    return np.concatenate(parts)
