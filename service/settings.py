"""The one settings object. Its values come from flags, `HBLL_*` variables and a TOML file, in this order; what is given
nowhere has its default. Where each came from is `service.sources`' to say."""

from __future__ import annotations

import os
import tempfile
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FilePath, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from service.policy import DEFAULT_POLICY, check_policy_name
from service.version_policy import Versions

PREFIX = "HBLL_"
_CLIENTS_PREFIX = "HBLL_CLIENT_"
"""For `hbll predict`, which may be used where a server starts."""
_WORKERS_VARIABLE = "WEB_CONCURRENCY"
"""Not ours: platforms set it for servers that can have several processes."""


def spare_cores() -> int:
    """The processors that this process may use, less one for the event loop; at least one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable - 1)


def default_cache_dir() -> Path:
    """The user's cache folder by the XDG specification; for a user without a home the one for temporary files."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        folder = Path(tempfile.gettempdir())
    return folder / "hbll"


def _none(value: object) -> object:
    """TOML and the environment have no null."""
    return None if value == "none" else value


class ModelSettings(BaseModel):
    """What can be set for each model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str = Field(
        DEFAULT_POLICY,
        description="how requests are scheduled: ladder-edf, or one to compare it with: static(PATH), aimd(PATH), "
        "cheapest, max-accuracy, max-batch, slackfit, clockwork",
    )
    min_depth: int = Field(1, ge=1, description="fewest blocks of an answer: what would be shallower is refused")
    default_latency_budget_ms: Annotated[float | None, BeforeValidator(_none)] = Field(
        None, gt=0, description='budget of requests without any wish; "none": they have none'
    )
    audit_rate: float = Field(
        0.01, ge=0, le=1, description="share of requests with max_risk that are compared with the reference path"
    )
    versions: Versions = Field(
        "latest",
        description="which versions are served: latest, how many of the highest, all, or a list like [1, 3]",
    )

    @field_validator("policy")
    @classmethod
    def _is_a_policy(cls, name: str) -> str:
        check_policy_name(name)
        return name


class Settings(BaseSettings, ModelSettings):
    """Everything that can be set about a server. An unknown or bad value stops start-up and names the key."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    config: Path | None = Field(None, description="TOML file with settings, by the names of this table; itself not in it")
    models: Path = Field(Path("models"), description="model repository: MODEL/VERSION/ folders, each a bundle")
    host: str = Field("127.0.0.1", min_length=1, description="address to listen at; 0.0.0.0: all")
    port: int = Field(8000, ge=0, le=65535, description="port to listen at; 0: a free one")
    grpc_port: int | None = Field(
        None, ge=0, le=65535, description="port of the Open Inference Protocol over gRPC; 0: a free one; none: no gRPC"
    )
    workers: int = Field(1, description="processes; only 1, since a device has one scheduler: run replicas instead")
    drain_s: int = Field(10, ge=0, description="how long a server that is told to end waits for its clients")

    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="auto: a GPU where onnxruntime-gpu finds one")
    threads: int = Field(default_factory=spare_cores, ge=1, description="CPU threads of one inference")
    max_batch: int = Field(32, ge=1, le=4096, description="rows of one inference")
    max_queue_rows: int = Field(1024, ge=1, description="rows that may wait; beyond them requests get 429")
    reserve_ms: float = Field(1.0, ge=0, description="time kept back from every budget to build and send the answer")
    cache_dir: Path = Field(
        default_factory=default_cache_dir, description="where measured latencies are kept for the next start"
    )
    poll_s: float = Field(
        10.0,
        ge=0,
        description="how often the repository is searched for versions that have come or gone; 0: never",
    )

    max_request_rows: int = Field(256, ge=1, description="rows of one request")
    max_image_pixels: int = Field(16_000_000, ge=1, description="pixels of all images of a request, before resizing")
    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1024, description="longest request body, as sent and decompressed")
    max_header_bytes: int = Field(32 * 1024, ge=1024, description="longest URL and headers of a request; beyond: 431")
    max_connections: int = Field(4096, ge=1, description="open connections; a request on one more gets 503")
    header_timeout_s: float = Field(10, gt=0, description="for a request's headers to arrive, from the connection's start")
    body_timeout_s: float = Field(
        30,
        gt=0,
        description="for a whole body, or the one message of a gRPC call, to arrive; beyond: 408; also how long a client "
        "may stop reading its answer",
    )

    keys_file: Path | None = Field(
        None, description="TOML file of API keys, see `hbll keys`; with it every request to /v1 and /v2 needs one"
    )
    metrics_need_key: bool = Field(False, description="whether /metrics needs an API key, too")
    tls_cert: FilePath | None = Field(None, description="certificate chain, PEM; with it the server speaks HTTPS")
    tls_key: FilePath | None = Field(None, description="the certificate's private key, PEM, if not in the same file")
    tls_key_password: SecretStr | None = Field(None, description="password of the private key")
    tls_key_password_file: FilePath | None = Field(None, description="file with that password, instead")
    tls_client_ca: FilePath | None = Field(
        None, description="certificates of authorities, PEM; with it clients need a certificate by one of them"
    )

    access_log: bool = Field(False, description="one line of JSON on stdout for each request")
    log_format: Literal["text", "json"] = Field("text", description="of the server's other messages, on stderr")

    per_model: dict[str, ModelSettings] = Field(
        default_factory=dict,
        description="what of policy, min_depth, default_latency_budget_ms, audit_rate and versions is different for single "
        'models: tables `[per_model.NAME]` of the file, or JSON like {"digits": {"min_depth": 2}}',
    )

    def of_model(self, name: str) -> ModelSettings:
        """What is set for this model: its own, else the server's."""
        common = {key: getattr(self, key) for key in ModelSettings.model_fields}
        own = self.per_model.get(name, ModelSettings())
        return ModelSettings.model_validate(common | own.model_dump(exclude_unset=True))

    @property
    def key_password(self) -> str | None:
        """The password of the TLS key, wherever it is kept."""
        if self.tls_key_password is not None:
            return self.tls_key_password.get_secret_value()
        if self.tls_key_password_file is not None:
            return self.tls_key_password_file.read_text(encoding="utf-8").rstrip("\r\n")
        return None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, the environment, the file."""
        file = init_settings().get("config") or env_settings().get("config")
        return (init_settings, env_settings, *([file_source(Path(file))] if file else []))

    @field_validator("workers")
    @classmethod
    def _is_one(cls, workers: int) -> int:
        if workers != 1:
            raise ValueError(
                f"expected 1, got {workers}: the models of a device have one scheduler, which knows all requests; "
                "several processes would each plan as if they were alone. Run replicas, each with cores or a GPU of its own"
            )
        return workers

    @model_validator(mode="after")
    def _is_possible(self) -> Settings:
        if self.max_request_rows > self.max_queue_rows:
            raise ValueError(
                f"max_request_rows must be at most max_queue_rows, got {self.max_request_rows} and {self.max_queue_rows}"
            )
        if self.tls_key_password is not None and self.tls_key_password_file is not None:
            raise ValueError("give only one of tls_key_password and tls_key_password_file")
        others = ("tls_key", "tls_key_password", "tls_key_password_file", "tls_client_ca")
        if self.tls_cert is None and (given := [name for name in others if getattr(self, name) is not None]):
            raise ValueError(f"tls_cert must be given with {' and '.join(given)}")
        return self

    @model_validator(mode="after")
    def _knows_all_variables(self) -> Settings:
        known = {PREFIX + name.upper() for name in type(self).model_fields}
        unknown = sorted(
            name
            for name in os.environ
            if name.upper().startswith(PREFIX)
            and name.upper() not in known
            and not name.upper().startswith(_CLIENTS_PREFIX)
        )
        if unknown:
            raise ValueError(f"unknown variable {', '.join(unknown)}: expected some of {', '.join(sorted(known))}")
        if (workers := os.environ.get(_WORKERS_VARIABLE, "")) not in ("", "1"):
            raise ValueError(f"{_WORKERS_VARIABLE}: expected 1, got {workers[:20]!r}: see the setting workers")
        return self


def file_source(file: Path) -> TomlConfigSettingsSource:
    """The settings in a TOML file, as a source.

    Raises:
        SettingsError: there is no such file, it cannot be read, or it names another.
    """
    if not file.is_file():  # of which pydantic-settings says nothing
        raise SettingsError(f"{file}: there is no such file")
    try:
        source = TomlConfigSettingsSource(Settings, file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise SettingsError(f"{file} cannot be read as TOML: {exc}") from exc
    if "config" in source.toml_data:
        raise SettingsError(f"{file}: config: a file of settings cannot name another")
    return source
