"""Augmentation of images, vectorised: each row of a batch is moved and mirrored in its own way."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from training.dataset import Augmentation, unchanged


def augmentation(shift: int, *, flip: bool) -> Augmentation:
    """Shifts by up to `shift` pixels and, with `flip`, mirrors half of the images.

    A shift that fills with zeros is what is usually called a random crop of the image padded by `shift`.
    """
    if not shift and not flip:
        return unchanged
    return partial(_augment, shift, flip)


def _augment(shift: int, flip: bool, images: Tensor, rng: np.random.Generator) -> Tensor:
    if flip:
        images = mirror_images(images, rng)
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
