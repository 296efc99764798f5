from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.augmentation import shift_images
from training.dataset import Dataset
from training.digits import load_digits


def test_splits_are_stratified_disjoint_and_the_same_every_time(digits: Dataset) -> None:
    plain, again = load_digits(0), load_digits(0)
    sizes = {"train": 3000, "validation": 500, "certification": 500, "test": 1000}
    seen: set[bytes] = set()
    for name, size in sizes.items():
        split = getattr(plain, name)
        assert len(split) == size
        assert torch.bincount(split.labels).tolist() == [size // 10] * 10
        assert torch.equal(split.x, getattr(again, name).x)
        assert split.x.min() >= 0
        assert split.x.max() <= 1
        seen |= {image.numpy().tobytes() for image in split.x}
    assert len(seen) == 5000
    assert torch.equal(digits.train.x, plain.train.x)  # shifted afresh in each batch instead
    assert not torch.equal(digits.test.x, plain.test.x)


@given(st.integers(0, 6), st.integers(0, 2**31))
def test_shift_moves_each_image_by_its_own_offset_and_fills_with_background(shift: int, seed: int) -> None:
    images = torch.zeros(5, 20, 20)
    images[:, 10, 10] = 1
    moved = shift_images(images, shift, np.random.default_rng(seed))
    assert moved.shape == images.shape
    assert torch.equal(moved.sum(dim=(1, 2)), torch.ones(5))
    _, y, x = torch.nonzero(moved, as_tuple=True)
    assert ((y - 10).abs() <= shift).all()
    assert ((x - 10).abs() <= shift).all()


def test_shifts_reach_both_ends() -> None:
    images = torch.zeros(2000, 9, 9)
    images[:, 4, 4] = 1
    moved = shift_images(images, 4, np.random.default_rng(0)).sum(dim=0)
    assert (moved > 0).all()
