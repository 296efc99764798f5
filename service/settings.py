"""The one settings object, read once at start-up from flags and `HBLL_*` environment variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

_PREFIX = "HBLL_"


def spare_cores() -> int:
    """The processors that this process may use, less one for the event loop; at least one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable - 1)


class Settings(BaseSettings):
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
    default_latency_budget_ms: float | None = Field(None, gt=0, description="budget of requests without any wish")
    reserve_ms: float = Field(1.0, ge=0, description="time kept back from every budget to build and send the answer")

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
