"""What the command line asks a server about: image files, and the rows of tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
from numpy.typing import NDArray

from hbll.client import Client
from hbll.table import SUFFIXES, TableError, read_rows

Command = TypeVar("Command", bound=Callable[..., Any])


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


def _depth(_: click.Context, __: click.Parameter, value: str | None) -> int | str | None:
    return int(value) if value is not None and value.isdecimal() else value


_ASKING = (
    click.argument("files", type=click.Path(path_type=Path, exists=True, dir_okay=False), nargs=-1, required=True),
    click.option("--model", help="Name of the model.  [default: the only one served]"),
    click.option("--version", type=click.IntRange(min=1), help="Of the model.  [default: the newest]"),
    click.option("--drop", multiple=True, metavar="COLUMN", help="Of tables, to be left out. Can be repeated."),
    click.option("--depth", callback=_depth, help="Blocks to run: a number, best or full."),
    click.option("--path", help="Nodes of a path, like 4-6-7."),
    click.option("--min-confidence", type=float, help="Go deeper until the answer is this confident, 0..1."),
    click.option("--max-risk", type=float, help="Go deeper until the answer is certified to this level, such as 0.05."),
    click.option(
        "--api-key",
        envvar="HBLL_CLIENT_API_KEY",
        show_envvar=True,
        help="Key for the server; other users of this machine can read a command line, and not the environment.",
    ),
)


def asking(command: Command) -> Command:
    """The arguments of every command that asks a server: about what, which model, and with which wishes."""
    return reduce(lambda wrapped, option: option(wrapped), reversed(_ASKING), command)


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
