"""From the section `[data]` of a configuration to a data set; each kind has a module, imported when it is used."""

from __future__ import annotations

from pathlib import Path

from training.checkpoint import load_spec
from training.corruption import corrupt
from training.data_config import (
    ArraysConfig,
    DataConfig,
    DigitsConfig,
    ImagesConfig,
    PublishedConfig,
    TableConfig,
    TextConfig,
)
from training.dataset import DataError, Dataset
from training.digits import load_digits

_DIGITS_CORRUPTION_SEED = 0


def load_data(config: DataConfig) -> Dataset:
    """Read, split and, where the configuration says so, corrupt a data set. Paths are relative to the working directory.

    Raises:
        DataError: the data are not what the configuration says; the message names the file, and the row and column.
    """
    if isinstance(config, TextConfig):
        return _load(config)
    seed = _DIGITS_CORRUPTION_SEED if isinstance(config, DigitsConfig) else config.seed
    return corrupt(_load(config), config, seed)


def load_data_of(run: Path, config: DataConfig) -> Dataset:
    """The data that a run was trained on.

    Raises:
        DataError: they cannot be read, or are others by now.
    """
    data = load_data(config)
    if changes := data.changes_since(load_spec(run)):
        raise DataError(
            f"{data.spec.description}: these are not the data that {run} was trained on: {changes}. Scores on them would "
            "mix rows that it has seen with others: restore the data, or train again"
        )
    return data


def _load(config: DataConfig) -> Dataset:
    match config:
        case DigitsConfig():
            return load_digits(config.shift)
        case TableConfig():
            from training.tables import load_table

            return load_table(config)
        case ArraysConfig():
            from training.arrays import load_arrays

            return load_arrays(config)
        case ImagesConfig():
            from training.folders import load_images

            return load_images(config)
        case PublishedConfig():
            from training.publications import load_published

            return load_published(config)
        case TextConfig():
            from training.text import load_windows

            return load_windows(config)
