"""Write the tables of docs/config.md: `python -m training.config_page docs/config.md`. A test keeps them equal to the
configuration's own descriptions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, get_args

import click
from pydantic.fields import FieldInfo

from training.config import RunConfig, TrainConfig, kinds_of
from training.data_config import Section

_BEGIN, _END = "<!-- the keys' own descriptions, by training.config_page -->\n", "<!-- end -->\n"
_SIGNS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def config_tables() -> str:
    """A table for each section, and for each kind of a model and of data, of all keys in their order."""
    name = RunConfig.model_fields["name"]
    parts = ["## The run\n", _table({"name": name})]
    for section in ("model", "data"):
        default = getattr(RunConfig(), section).kind
        parts.append(f"## [{section}]\n\n`kind` says which keys there are; without it, it is `{default}`.\n")
        for kinds, each in _classes(section).items():
            keys = {key: field for key, field in each.model_fields.items() if key != "kind"}
            title = ", ".join(f'kind = "{kind}"' for kind in kinds)
            parts += [f"### {title}\n", f"{' '.join((each.__doc__ or '').split())}\n", _table(keys)]
    parts += ["## [train]\n", f"{TrainConfig.__doc__}\n", _table(TrainConfig.model_fields)]
    return "\n".join(parts)


def with_tables(page: str) -> str:
    """`page` with the tables as they should be."""
    return re.sub(f"(?<={re.escape(_BEGIN)}).*?(?={re.escape(_END)})", lambda _: config_tables(), page, flags=re.DOTALL)


def _classes(section: Literal["model", "data"]) -> dict[tuple[str, ...], type[Section]]:
    """Each class once, by all kinds it is for."""
    classes: dict[type[Section], tuple[str, ...]] = {}
    for kind, each in kinds_of(section).items():
        classes[each] = (*classes.get(each, ()), kind)
    return {kinds: each for each, kinds in classes.items()}


def _table(fields: dict[str, FieldInfo]) -> str:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        rows.append(f"| `{name}` | {_values(field)} | {_default(field)} | {field.description} |")
    return "\n".join(rows) + "\n"


def _values(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {_number(bound)}"
        for condition in field.metadata
        for name, sign in _SIGNS.items()
        if (bound := getattr(condition, name, None)) is not None
    ]
    return f"{_kind(field.annotation)} {', '.join(bounds)}".strip()


def _kind(annotation: Any) -> str:
    names = {bool: "`true` or `false`", int: "whole number", float: "number", str: "text", Path: "path"}
    if annotation in names:
        return names[annotation]
    parts = get_args(annotation)
    if isinstance(parts[0], str | int):
        return ", ".join(f"`{json.dumps(value)}`" for value in parts)
    if annotation == tuple[str, ...]:
        return "list of text"
    return " or ".join(_kind(part) for part in parts if part is not type(None))


def _number(value: float) -> str:
    return "2^32" if value == 2**32 else f"{value:,}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "none: it must be given"
    return "" if field.default is None else f"`{json.dumps(field.default)}`"


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def main(file: Path) -> None:
    """Put the tables of all keys into the page FILE."""
    file.write_text(with_tables(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
