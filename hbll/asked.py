"""What the command line asks a server about: image files, and the rows of tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from hbll.client import Client
from hbll.table import SUFFIXES, TableError, read_rows


@dataclass(frozen=True, slots=True)
class Asked:
    """An image file's content; or row `number` of a table, from 1, `(features,) float32`."""

    file: Path
    content: bytes | NDArray[np.float32]
    number: int | None = None

    @property
    def name(self) -> str:
        """For people."""
        return self.file.name if self.number is None else f"{self.file.name}:{self.number}"


def only_model(client: Client) -> str:
    """The name of the model that is served, if it is one."""
    names = [model.name for model in client.models()]
    if not names:
        raise click.ClickException("no model is served there")
    if len(names) > 1:
        raise click.ClickException(f"several models are served: add --model, one of {', '.join(names)}")
    return names[0]


def read_files(
    client: Client, model: str, version: int | None, files: Sequence[Path], drop: Sequence[str]
) -> tuple[list[Asked], list[list[Asked]]]:
    """The images among `files`, and the rows of each table, without the columns to `drop`.

    Raises:
        HbllError: the server does not know the model.
        TableError: a table is not one that the model takes.
    """
    tables = [file for file in files if file.suffix.lower() in SUFFIXES]
    images = [Asked(file, file.read_bytes()) for file in files if file not in tables]
    if drop and not tables:
        raise click.UsageError("--drop goes with tables")
    features = client.model(model, version=version).features if tables else None
    if tables and features is None:
        raise TableError(f"{tables[0]}: model {model} was not trained on a table, and has no columns")
    rows = [
        [Asked(file, values, number) for number, values in enumerate(read_rows(file, features or (), drop), start=1)]
        for file in tables
    ]
    return images, rows
