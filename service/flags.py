"""Flags of `hbll serve`: options of click made from the settings' own types, defaults and descriptions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic import FilePath

from service.settings import PREFIX, Settings

F = TypeVar("F", bound=Callable[..., Any])

FLAGS = (
    "config",
    "host",
    "port",
    "grpc_port",
    "workers",
    "device",
    "threads",
    "max_batch",
    "policy",
    "min_depth",
    "default_latency_budget_ms",
    "keys_file",
    "tls_cert",
    "tls_key",
    "access_log",
    "log_format",
)
"""The settings that people give by hand; the others come from the environment or the file."""

_DEPENDS = {"threads": "all cores but one", "cache_dir": "hbll in the user's cache folder", "per_model": ""}


def flag_of(name: str) -> str:
    """The flag of a setting, as it is shown."""
    kebab = name.replace("_", "-")
    return f"--{kebab}/--no-{kebab}" if Settings.model_fields[name].annotation is bool else f"--{kebab}"


def default_of(name: str) -> str:
    """The default of a setting in words; empty if it has none."""
    field = Settings.model_fields[name]
    if field.default_factory is not None:
        return _DEPENDS[name]
    if field.default is None:
        return ""
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def settings_flags(command: F) -> F:
    """Decorates a command with `FLAGS`. Its parameters are None where a flag is not given; values are left to the settings
    to check, so that an error reads the same wherever a value comes from."""
    for name in reversed(FLAGS):
        command = _option(name)(command)
    return command


def others() -> str:
    """The variables of the settings without a flag."""
    names = (name for name in Settings.model_fields if name not in (*FLAGS, "models"))
    return ", ".join(PREFIX + name.upper() for name in names)


def _option(name: str) -> Callable[[F], F]:
    field = Settings.model_fields[name]
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else None
    default = default_of(name)
    return click.option(
        flag_of(name),
        default=None,
        type=click.Choice(choices) if choices else None,
        metavar=None if choices or field.annotation is bool else _metavar(field.annotation),
        help=_sentence(field.description) + (f"  [default: {default}]" if default else ""),
    )


def _metavar(annotation: Any) -> str:
    kinds = get_args(annotation) or (annotation,)
    if int in kinds or float in kinds:
        return "NUMBER"
    return "FILE" if Path in kinds or FilePath in kinds else "TEXT"


def _sentence(text: str | None) -> str:
    assert text, "every setting is described"
    return f"{text[0].upper()}{text[1:]}."
