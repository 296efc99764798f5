"""Write the contract: `python -m service.openapi openapi.yaml`. A test keeps the file equal to the app."""

from __future__ import annotations

from pathlib import Path

import click
import yaml

from service.app import create_app
from service.repository import Repository
from service.settings import Settings


def contract() -> str:
    """The app's OpenAPI document as YAML."""
    app = create_app(Settings(), Repository({}))
    return yaml.safe_dump(app.openapi(), sort_keys=False, allow_unicode=True, width=110)


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def main(file: Path) -> None:
    """Write the contract to FILE, as YAML."""
    file.write_text(contract(), encoding="utf-8")


if __name__ == "__main__":
    main()
