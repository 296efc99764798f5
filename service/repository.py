"""The model repository: a folder of `MODEL/VERSION/` bundles, checked and loaded before anything is served."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Protocol

import numpy as np

from family.manifest import BundleError, Manifest, check_files, load_manifest
from family.tree import Path
from service.errors import UnknownModel
from service.policy import reachable_segments
from service.profile import LatencyProfile, Segment, measure_profile
from service.runtime import Output, Rows, Runtime
from service.settings import Settings

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Runner(Protocol):
    """What the engine and the profile need of a runtime."""

    def run(self, nodes: Path, source: Rows, *, embed: bool, predict: bool = True, keep_state: bool = False) -> Output:
        """See `service.runtime.Runtime.run`."""
        ...


@dataclass(slots=True)
class ServedModel:
    """One loaded version of a model. `profile` is there once it is warm."""

    name: str
    version: int
    manifest: Manifest
    runner: Runner
    profile: LatencyProfile | None = None

    def warm_up(self, max_batch: int, clock: Callable[[], float], stop: Callable[[], bool]) -> None:
        """Run every segment that a request can cause, at several batch sizes, and keep how long each took by `clock`.

        Gives up, and leaves the model not warm, soon after `stop` says so.
        """
        rng = np.random.default_rng(0)
        x = rng.random((max_batch, *self.manifest.input.shape[1:]), dtype=np.float32)
        state = rng.standard_normal((max_batch, *self.manifest.state.shape[1:]), dtype=np.float32)

        def run(segment: Segment, rows: int) -> None:
            source = x if segment.embed else state
            self.runner.run(segment.nodes, source[:rows], embed=segment.embed)

        self.profile = measure_profile(run, reachable_segments(self.manifest), max_batch, clock, stop)

    def latency_s(self, segment: Segment, rows: int) -> float:
        """Predicted seconds of a run; 0 while the model is not warm."""
        return self.profile.latency_s(segment, rows) if self.profile else 0.0


class Repository:
    """The served models by name."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self.models = dict(sorted(models.items()))

    def get(self, name: str) -> ServedModel:
        """Raises `UnknownModel` with the names that are served."""
        try:
            return self.models[name]
        except KeyError:
            served = list(self.models)
            raise UnknownModel(
                f"no model {name[:80]!r} is served here: expected one of {', '.join(served)}", models=served
            ) from None


def open_repository(settings: Settings) -> Repository:
    """Load the highest version of every model in `settings.models`.

    Raises:
        BundleError: the folder is missing or empty, or a bundle is damaged; the message names the folder or file.
    """
    root = settings.models
    if not root.is_dir():
        raise BundleError(f"{root} is no folder: expected a model repository, MODEL/VERSION/ (make one with `hbll export`)")
    models = {}
    for folder in sorted(root.iterdir()):
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        if not _MODEL_NAME.fullmatch(folder.name):
            raise BundleError(f"{folder}: expected a model's name of letters, digits, '.', '_' and '-'")
        versions = [int(child.name) for child in folder.iterdir() if re.fullmatch(r"[1-9][0-9]{0,8}", child.name)]
        if not versions:
            raise BundleError(f"{folder} holds no version: expected a folder like {folder / '1'}")
        models[folder.name] = _load(folder.name, max(versions), root, settings)
    if not models:
        raise BundleError(f"{root} holds no model: expected MODEL/VERSION/ folders (make one with `hbll export`)")
    return Repository(models)


def _load(name: str, version: int, root: FilePath, settings: Settings) -> ServedModel:
    bundle = root / name / str(version)
    manifest = load_manifest(bundle)
    check_files(bundle, manifest)
    runtime = Runtime(bundle, manifest, threads=settings.threads, device=settings.device)
    return ServedModel(name, version, manifest, runtime)
