"""Augmentation of images: each row of a batch is moved, mirrored and distorted in its own way."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from family.manifest import ImageInput
from training.config import ConfigError
from training.data_config import Augmented
from training.dataset import Augmentation, unchanged

_OPERATIONS = 2
"""That RandAugment applies to each image, one after the other: N in its paper, 2 for ImageNet."""


def augmentation(config: Augmented, image: ImageInput | None) -> Augmentation:
    """What `config` wants, in this order: half of the images mirrored, all of them shifted, all distorted by RandAugment.

    A shift that fills with zeros is what is usually called a random crop of the image padded by that shift.

    Raises:
        ConfigError: RandAugment for grey images, or without the package that it comes from.
    """
    steps: list[Augmentation] = []
    if config.flip:
        steps.append(mirror_images)
    if config.shift:
        steps.append(partial(_shifted, config.shift))
    if config.rand_augment:
        if image is None or image.channels != 3:
            raise ConfigError("data.rand_augment changes colours: expected images of 3 channels, got grey ones")
        steps.append(RandAugment(config.rand_augment))
    return partial(_in_turn, steps) if steps else unchanged


def _in_turn(steps: list[Augmentation], images: Tensor, rng: np.random.Generator) -> Tensor:
    for step in steps:
        images = step(images, rng)
    return images


def _shifted(shift: int, images: Tensor, rng: np.random.Generator) -> Tensor:
    return shift_images(images, shift, rng)


def shift_images(images: Tensor, shift: int, rng: np.random.Generator) -> Tensor:
    """Move each image by its own integer `dx, dy`, uniform in `-shift..shift`, filling with background (0).

    `images` is `(rows, height, width)` or `(rows, channels, height, width) float32`; the result has the same shape.
    """
    if shift == 0:
        return images
    rows, *channels, height, width = images.shape
    y, x = torch.from_numpy(rng.integers(0, 2 * shift + 1, size=(2, rows)))
    padded = torch.nn.functional.pad(images, (shift, shift, shift, shift))
    windows = padded.unfold(-2, height, 1).unfold(-2, width, 1)  # a view of all places: (rows, ..., y, x, height, width)
    row = torch.arange(rows)
    return windows[row, :, y, x] if channels else windows[row, y, x]


def mirror_images(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Mirror half of the images, drawn at random, left to right; shapes as for `shift_images`."""
    mirrored = torch.from_numpy(rng.random(len(images)) < 0.5)
    return torch.where(mirrored.reshape(-1, *[1] * (images.ndim - 1)), images.flip(-1), images)


class RandAugment:
    """RandAugment (Cubuk et al. 2019, arXiv 1909.13719) by kornia's operations and ranges.

    Each image gets two different operations of fifteen, in the order drawn, all of one magnitude. kornia's own class draws
    two operations for a whole batch; here each operation runs once a batch and turn, on those images that drew it.
    """

    def __init__(self, magnitude: int) -> None:
        """`magnitude`: 1 to 29, the share of each operation's range times 30 (the M of the paper).

        Raises:
            ConfigError: the package kornia is missing.
        """
        try:
            from kornia.augmentation.auto import RandAugment as OfABatch
            from kornia.augmentation.auto.rand_augment.rand_augment import default_policy
        except ImportError as exc:
            raise ConfigError("data.rand_augment needs the package kornia: pip install 'hbll-anytime[augment]'") from exc
        self._operations = [OfABatch(n=1, m=magnitude, policy=[operation]) for operation in default_policy]

    def __call__(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """`images` is `(rows, 3, height, width) float32` in 0..1, and so is the result."""
        drawn = rng.random((len(images), len(self._operations))).argsort(axis=1)[:, :_OPERATIONS]
        result = images.clone()
        with torch.random.fork_rng(devices=()):  # kornia draws from torch's generator, which is not the run's
            torch.default_generator.manual_seed(int(rng.integers(2**63)))
            for turn in drawn.T:
                for number, operation in enumerate(self._operations):
                    rows = torch.from_numpy(np.flatnonzero(turn == number))
                    if len(rows):
                        result[rows] = operation(result[rows])
        return result
