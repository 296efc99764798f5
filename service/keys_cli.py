"""`hbll keys`: make, list and remove API keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from service.keyring import KeysError, add_key, read_keys, remove_key

F = TypeVar("F", bound=Callable[..., Any])


def _file_option(command: F) -> F:
    return click.option(
        "--file",
        type=click.Path(path_type=Path, dir_okay=False),
        default="keys.toml",
        show_default=True,
        envvar="HBLL_KEYS_FILE",
        show_envvar=True,
        help="The file of keys.",
    )(command)


class _Group(click.Group):
    """Tells what is wrong with a file as an error of the command line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeysError as exc:
            raise click.ClickException(str(exc)) from exc


@click.group(cls=_Group)
def keys() -> None:
    """Make, list and remove API keys. The server takes changes of the file within a second.

    \b
    Examples:
      hbll keys add alice --rate 100/second --file keys.toml
      hbll serve models --keys-file keys.toml
      curl -H "authorization: Bearer $KEY" localhost:8000/v1/models
    """


@keys.command()
@click.argument("name")
@click.option("--rate", help="How many requests in what time, like 100/second or 5000/hour.  [default: any]")
@click.option("--admin", is_flag=True, help="May also load models and reset audits.")
@_file_option
def add(name: str, rate: str | None, admin: bool, file: Path) -> None:
    """Make a key called NAME and print it, this once: the file keeps only its hash."""
    click.echo(add_key(file, name, rate=rate, admin=admin))


@keys.command(name="list")
@_file_option
def list_keys(file: Path) -> None:
    """List the keys: names, rates, operators."""
    for key in read_keys(file):
        click.echo("\t".join((key.name, str(key.rate or "any rate"), "admin" if key.admin else "")).rstrip())


@keys.command()
@click.argument("name")
@_file_option
def remove(name: str, file: Path) -> None:
    """Remove the key called NAME."""
    remove_key(file, name)
