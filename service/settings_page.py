"""Write the table of docs/settings.md: `python -m service.settings_page docs/settings.md`. A test keeps it equal to the
settings' own descriptions."""

from __future__ import annotations

import re
from pathlib import Path

import click

from service.flags import FLAGS, default_of, flag_of
from service.settings import Settings

_BEGIN, _END = "<!-- the settings' own descriptions, by service.settings_page -->\n", "<!-- end -->\n"


def settings_table() -> str:
    """A row for each setting, in their order."""
    rows = ["| setting | flag | default | meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        flag = "argument MODELS" if name == "models" else f"`{flag_of(name)}`" if name in FLAGS else ""
        default = default_of(name) if field.default_factory else f"`{default_of(name)}`" if default_of(name) else ""
        rows.append(f"| `{name}` | {flag} | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def with_table(page: str) -> str:
    """`page` with the table as it should be."""
    return re.sub(f"(?<={re.escape(_BEGIN)}).*?(?={re.escape(_END)})", lambda _: settings_table(), page, flags=re.DOTALL)


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def main(file: Path) -> None:
    """Put the table of all settings into the page FILE."""
    file.write_text(with_table(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
