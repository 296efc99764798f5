"""What a data set is to the rest: four splits of tensors, and a description with which a model is built and served."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from family.manifest import ImageInput, Normalisation
from training.data_config import DataConfig


class DataError(ValueError):
    """Data that cannot be used; the message names the file, and the row and column where there is one."""


class DataSpec(BaseModel):
    """What a model has to know of its data; a run keeps it beside its checkpoint.

    `input_shape` is that of one row, `labels` are the names of the classes in the order of their numbers, `features` the
    names of the columns of a table. `normalisation` is for the embedding, so that clients send plain values. Rows of
    tokens have none, and a `vocabulary`: they are whole numbers below it, int64 where other rows are float32. `digests` of
    the splits are what a run keeps to know its data again; runs from before there were any have none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    description: str
    input_shape: tuple[int, ...]
    labels: tuple[str, ...]
    normalisation: Normalisation | None = None
    vocabulary: int | None = None
    image: ImageInput | None = None
    features: tuple[str, ...] | None = None
    digests: dict[str, str] | None = None

    @model_validator(mode="after")
    def _fits(self) -> DataSpec:
        if not self.input_shape or min(self.input_shape) < 1:
            raise ValueError(f"expected an input shape of positive sizes, got {self.input_shape}")
        if (self.normalisation is None) == (self.vocabulary is None):
            raise ValueError("expected either a normalisation or, for rows of tokens, a vocabulary")
        if self.normalisation is not None and len(self.normalisation.mean) not in (1, self.input_shape[0]):
            raise ValueError(f"expected 1 or {self.input_shape[0]} means, got {len(self.normalisation.mean)}")
        return self

    def constants(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation as float32, shaped to broadcast over rows of `input_shape`.

        Raises:
            DataError: rows are tokens.
        """
        if self.normalisation is None:
            raise DataError(f"{self.description}: rows of tokens have no mean: the model must embed them")
        mean, std = (
            torch.tensor(values, dtype=torch.float32) for values in (self.normalisation.mean, self.normalisation.std)
        )
        if len(mean) == 1:
            return mean[0], std[0]
        shape = (-1, *[1] * (len(self.input_shape) - 1))
        return mean.reshape(shape), std.reshape(shape)


def measure_normalisation(x: Tensor, *, by_first_axis: bool) -> Normalisation:
    """Mean and standard deviation of `x` `(rows, ...)`: of all values, or of each index of a row's first axis.

    To six digits, so that they are the same on every machine; what is constant is not scaled.
    """
    columns = x.movedim(1, 0).flatten(1) if by_first_axis else x.reshape(1, -1)
    std, mean = torch.std_mean(columns.double(), dim=1, correction=0)
    return Normalisation(mean=_six_digits(mean), std=_six_digits(torch.where(std > 0, std, 1)))


def _six_digits(values: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values.tolist())


@dataclass(frozen=True, slots=True)
class Split:
    """Inputs `x` `(rows, *input_shape)`, float32 or, of tokens, int64, and `labels` `(rows,) int64`."""

    x: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """SHA-256 of all rows and labels."""
        digest = hashlib.sha256()
        for tensor in (self.x, self.labels):
            digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().reshape(-1).data)
        return digest.hexdigest()


Augmentation = Callable[[Tensor, np.random.Generator], Tensor]
"""Changes a training batch `(rows, *input_shape)`, each row in its own way; the shape stays."""


def unchanged(x: Tensor, _rng: np.random.Generator) -> Tensor:
    """The augmentation of data that have none."""
    return x


@dataclass(frozen=True, slots=True)
class Dataset:
    """The four splits, what they are, and where they come from. `augment` is for batches of `train` alone.

    `left_out` says what of the source is in no split, for the user to read; it is kept nowhere.
    """

    train: Split
    validation: Split
    certification: Split
    test: Split
    spec: DataSpec
    source: DataConfig
    augment: Augmentation = unchanged
    left_out: str | None = None

    def spec_to_keep(self) -> DataSpec:
        """The description, with digests of the splits."""
        splits = {name: getattr(self, name) for name in ("train", "validation", "certification", "test")}
        return self.spec.model_copy(update={"digests": {name: split.digest() for name, split in splits.items()}})

    def changes_since(self, kept: DataSpec) -> str | None:
        """What differs from the data that `kept` describes, as half a sentence; none: nothing that is known."""
        now = self.spec_to_keep()
        if now.model_copy(update={"digests": kept.digests}) != kept:
            return "their shape, labels, columns or means differ"
        if kept.digests is None or now.digests == kept.digests:
            return None
        changed = [name for name, digest in (now.digests or {}).items() if kept.digests.get(name) != digest]
        return f"the rows or labels of {', '.join(changed)} differ"
