"""The one settings object, read once at start-up from flags and `HBLL_*` environment variables."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.policy import DEFAULT_POLICY, check_policy_name
from service.version_policy import Versions

_PREFIX = "HBLL_"


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


class ModelSettings(BaseModel):
    """What can be set for each model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str = Field(
        DEFAULT_POLICY,
        description="how requests are scheduled: ladder-edf, or one to compare it with: static(PATH), aimd(PATH), "
        "cheapest, max-accuracy, max-batch, slackfit, clockwork",
    )
    min_depth: int = Field(1, ge=1, description="fewest blocks of an answer: what would be shallower is refused")
    default_latency_budget_ms: float | None = Field(None, gt=0, description="budget of requests without any wish")
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

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, extra="forbid")

    models: Path = Field(Path("models"), description="model repository: MODEL/VERSION/ folders, each a bundle")
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="auto: a GPU where onnxruntime-gpu finds one")
    threads: int = Field(default_factory=spare_cores, ge=1, description="CPU threads of one inference")
    max_batch: int = Field(32, ge=1, le=4096, description="rows of one inference")
    max_queue_rows: int = Field(1024, ge=1, description="rows that may wait; beyond them requests get 429")
    max_request_rows: int = Field(256, ge=1, description="rows of one request")
    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1024, description="longest request body")
    max_image_pixels: int = Field(16_000_000, ge=1, description="pixels of all images of a request, before resizing")
    reserve_ms: float = Field(1.0, ge=0, description="time kept back from every budget to build and send the answer")
    cache_dir: Path = Field(
        default_factory=default_cache_dir, description="where measured latencies are kept for the next start"
    )
    poll_s: float = Field(
        10.0,
        ge=0,
        description="how often the repository is searched for versions that have come or gone; 0: never",
    )
    per_model: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="what of policy, min_depth, default_latency_budget_ms, audit_rate and versions is different for single "
        'models, as JSON like {"digits": {"min_depth": 2}}',
    )

    def of_model(self, name: str) -> ModelSettings:
        """What is set for this model: its own, else the server's."""
        common = {key: getattr(self, key) for key in ModelSettings.model_fields}
        return ModelSettings.model_validate(common | self.per_model.get(name, {}))

    @field_validator("per_model")
    @classmethod
    def _can_be_set(cls, per_model: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, settings in per_model.items():
            try:
                ModelSettings.model_validate(settings)
            except ValidationError as exc:
                first = exc.errors()[0]
                message = first["msg"].removeprefix("Value error, ")
                raise ValueError(f"{'.'.join((name, *map(str, first['loc'])))}: {message}") from exc
        return per_model

    @model_validator(mode="after")
    def _is_possible(self) -> Settings:
        if self.max_request_rows > self.max_queue_rows:
            raise ValueError(
                f"max_request_rows must be at most max_queue_rows, got {self.max_request_rows} and {self.max_queue_rows}"
            )
        return self

    @model_validator(mode="after")
    def _knows_all_variables(self) -> Settings:
        known = {_PREFIX + name.upper() for name in type(self).model_fields}
        unknown = sorted(name for name in os.environ if name.upper().startswith(_PREFIX) and name.upper() not in known)
        if unknown:
            raise ValueError(f"unknown variable {', '.join(unknown)}: expected some of {', '.join(sorted(known))}")
        return self
