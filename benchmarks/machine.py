"""How fast a machine runs a bundle: measured once, and kept in a file if the same is to be simulated again elsewhere."""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from family.manifest import Manifest
from service.profile import LatencyProfile, Parts, Segment
from service.repository import ServedModel
from service.runtime import Runtime
from service.settings import ModelSettings
from training.checkpoint import write_atomically

_MAX_BATCH = 32


class Machine(BaseModel):
    """Median seconds of the `parts` of a run, and at each of their batch sizes by how much runs exceed them, the 0.95
    quantile (`service.profile`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    parts: Parts
    ratios: tuple[float, ...]

    def profile(self, shallowest: Segment) -> LatencyProfile:
        """A new profile that knows what was measured, and has learned nothing since."""
        profile = LatencyProfile(self.parts)
        for rows, ratio in zip(self.parts.batches, self.ratios, strict=True):
            profile.observe(shallowest, rows, ratio * profile.typical_s(shallowest, rows))
        return profile


def measure_machine(bundle: Path, manifest: Manifest) -> Machine:
    """Time a bundle here, on one thread."""
    runtime = Runtime(bundle, manifest, threads=1, device="cpu")
    model = ServedModel("measured", 1, manifest, runtime, ModelSettings())
    model.warm_up(_MAX_BATCH, time.perf_counter, lambda: False)
    assert model.profile is not None
    parts = model.profile.parts
    return Machine(parts=parts, ratios=tuple(model.profile.ratio(rows) for rows in parts.batches))


def kept_machine(file: Path, bundle: Path, manifest: Manifest) -> Machine:
    """What `file` says of a machine; measured here and written to it if there is none.

    Raises:
        ValueError: it says it of a bundle with other blocks, or is no such file.
    """
    if not file.exists():
        machine = measure_machine(bundle, manifest)
        write_atomically(file, machine.model_dump_json(indent=1).encode())
        return machine
    try:
        machine = Machine.model_validate_json(file.read_bytes())
    except ValidationError as exc:
        raise ValueError(f"{file}: expected what an earlier call with --profile wrote: {exc}") from exc
    if set(machine.parts.nodes) != set(manifest.tree.nodes):
        raise ValueError(f"{file}: expected times of blocks {[*manifest.tree.nodes]}, got {[*machine.parts.nodes]}")
    return machine
