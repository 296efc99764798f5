"""Missing input and wrong labels, for the robustness experiment (Table 3).

Guessed, since the paper says no more than how many percent: pixels are missing one by one and independently, in all splits,
and a missing one is the mean pixel, which is zero after normalisation; wrong labels are any other class, in training alone.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from training.data import Digits, Split
from training.model import CLASSES, PIXEL_MEAN

_SEED = 20260619
"""The corruption is a property of the data, the same for all runs."""


def corrupt(data: Digits, missing: float, label_noise: float) -> Digits:
    """Digits with the share `missing` of all pixels and `label_noise` of the training labels made wrong."""

    def without(split: Split, stream: int) -> Split:
        rng = np.random.default_rng([_SEED, stream])
        gone = torch.from_numpy(rng.random(split.images.shape, dtype=np.float32) < missing)
        return Split(torch.where(gone, PIXEL_MEAN, split.images), split.labels)

    train = Split(data.train.images, _wrong(data.train.labels, label_noise))
    return replace(
        data,
        train=without(train, 0),
        validation=without(data.validation, 1),
        certification=without(data.certification, 2),
        test=without(data.test, 3),
    )


def _wrong(labels: Tensor, share: float) -> Tensor:
    rng = np.random.default_rng([_SEED, 4])
    rows = torch.from_numpy(rng.choice(len(labels), size=round(share * len(labels)), replace=False))
    changed = labels.clone()
    changed[rows] = (labels[rows] + torch.from_numpy(rng.integers(1, CLASSES, size=len(rows)))) % CLASSES
    return changed
