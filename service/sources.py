"""Where each setting comes from: the sources read one by one, so that errors and `hbll serve --show-config` can name them.
What the settings are and mean is in `service.settings`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource, SettingsError

from service.settings import PREFIX, Settings, file_source

Location = Sequence[str | int]


class WrongSettings(Exception):
    """What is wrong with the settings, each with its key and where that was given."""


@dataclass(frozen=True)
class Sourced:
    """Settings and what each source said, the strongest first."""

    settings: Settings
    sources: Sources

    def as_toml(self) -> str:
        """All settings as a file of settings, each with where it came from; secrets are left out, and said to be."""
        document = tomlkit.document()
        for name, value in self.settings.model_dump(mode="json", exclude={"per_model"}).items():
            origin = self.sources.origin([name])
            if name == "config":
                continue
            if value is None and name != "default_latency_budget_ms":
                document.add(tomlkit.comment(f"{name} =  # {origin}"))
            elif name == "tls_key_password":
                document.add(tomlkit.comment(f'{name} = "{value}"  # {origin}, masked'))
            else:
                document.add(name, _commented(value, origin))
        if self.settings.per_model:
            models = tomlkit.table(is_super_table=True)
            for model, own in self.settings.per_model.items():
                table = tomlkit.table()
                for key, value in own.model_dump(mode="json", exclude_unset=True).items():
                    table.add(key, _commented(value, self.sources.origin(["per_model", model, key])))
                models.add(model, table)
            document.add("per_model", models)
        return tomlkit.dumps(document)


@dataclass(frozen=True)
class Sources:
    """What flags, the environment and the file set, each by the settings' names."""

    flags: Mapping[str, Any]
    environment: Mapping[str, Any]
    file: Mapping[str, Any]
    file_name: str = ""

    def origin(self, location: Location) -> str:
        """Which of them sets the value at `location`: a setting's name, and the keys within it."""
        name = str(location[0])
        if _holds(self.flags, location):
            return "argument MODELS" if name == "models" else f"flag --{name.replace('_', '-')}"
        if _holds(self.environment, location):
            return f"environment {PREFIX}{name.upper()}"
        return f"file {self.file_name}" if _holds(self.file, location) else "default"


def load_settings(flags: Mapping[str, Any]) -> Sourced:
    """The settings that `flags` (by the settings' names), the environment and a file give.

    Raises:
        WrongSettings: some are unknown or wrong.
    """
    try:
        environment = EnvSettingsSource(Settings)()
        file = flags.get("config") or environment.get("config")
        in_file = file_source(Path(file))() if file else {}
    except SettingsError as exc:
        raise WrongSettings(f"{exc}: {exc.__cause__}" if isinstance(exc.__cause__, ValueError) else str(exc)) from exc
    sources = Sources(flags, environment, in_file, str(file or ""))
    try:
        return Sourced(Settings(**flags), sources)
    except ValidationError as exc:
        raise WrongSettings(
            "; ".join(_describe(problem["loc"], problem["msg"], sources) for problem in exc.errors())
        ) from exc


def _describe(location: Location, message: str, sources: Sources) -> str:
    message = message.removeprefix("Value error, ")
    if not location:
        return message
    return f"{'.'.join(map(str, location))} ({sources.origin(location)}): {message}"


def _holds(values: Any, location: Location) -> bool:
    """Whether `values` set what is at `location`, or a whole of which it is a part that cannot be looked into."""
    for key in location:
        if not isinstance(values, Mapping):
            return True
        if key not in values:
            return False
        values = values[key]
    return True


def _commented(value: Any, origin: str) -> tomlkit.items.Item:
    return tomlkit.item("none" if value is None else value).comment(origin)
