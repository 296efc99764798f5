"""The one settings object, read once at start-up from flags and `HBLL_*` environment variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


def spare_cores() -> int:
    """The processors that this process may use, less one for the event loop; at least one."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


class Settings(BaseSettings):
    """Everything that can be set about a server. An unknown or bad value stops start-up and names the key."""

    model_config = SettingsConfigDict(env_prefix="HBLL_", frozen=True, extra="forbid")

    models: Path = Field(Path("models"), description="model repository: MODEL/VERSION/ folders, each a bundle")
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="auto: a GPU where onnxruntime-gpu finds one")
    threads: int = Field(default_factory=spare_cores, ge=1, description="CPU threads of one inference")
    max_batch: int = Field(32, ge=1, le=4096, description="rows of one inference")
    max_queue_rows: int = Field(1024, ge=1, description="rows that may wait; beyond them requests get 429")
    max_request_rows: int = Field(256, ge=1, description="rows of one request")
    max_body_bytes: int = Field(8 * 1024 * 1024, ge=1024, description="longest request body")
    max_image_pixels: int = Field(16_000_000, ge=1, description="largest image, in pixels before resizing")
    default_latency_budget_ms: float | None = Field(None, gt=0, description="budget of requests without any wish")
    reserve_ms: float = Field(1.0, ge=0, description="time kept back from every budget to build and send the answer")
