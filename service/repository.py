"""The model repository: a folder of `MODEL/VERSION/` bundles, checked and loaded before anything is served."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Protocol

import numpy as np

from family.choice import climb, pareto_front
from family.manifest import MANIFEST_FILE, BundleError, Manifest, check_files, load_manifest, sha256_of
from family.tree import Path
from service.errors import UnknownModel
from service.policy import make_policy
from service.policy.state import Offer
from service.profile import LatencyProfile, Parts, Segment, measure_parts, warm_up_profile
from service.profile_cache import Circumstances, ProfileCache, processor_name
from service.runtime import Output, Rows, Runtime
from service.settings import ModelSettings, Settings

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


class Runner(Protocol):
    """What the engine and the profile need of a runtime."""

    @property
    def name(self) -> str:
        """Of the runtime, and its version."""
        ...

    @property
    def providers(self) -> tuple[str, ...]:
        """What it runs on, preferred first."""
        ...

    def run(self, nodes: Path, source: Rows, *, embed: bool, predict: bool = True, keep_state: bool = False) -> Output:
        """See `service.runtime.Runtime.run`."""
        ...


@dataclass(slots=True, eq=False)
class ServedModel:
    """One loaded version of a model. `profile` is there once it is warm; `digest` is the SHA-256 of its manifest.

    Raises:
        BundleError: its settings ask for a depth or a path that it does not offer.
    """

    name: str
    version: int
    manifest: Manifest
    runner: Runner
    settings: ModelSettings
    digest: str = ""
    threads: int = 1
    cache: ProfileCache | None = None
    profile: LatencyProfile | None = None

    def __post_init__(self) -> None:
        deepest = max(map(len, self.manifest.offered))
        if self.settings.min_depth > deepest:
            raise BundleError(
                f"model {self.name}: expected min_depth to be at most {deepest}, the deepest offered path, "
                f"got {self.settings.min_depth}"
            )
        nothing = Parts(batches=(1,), call=(0,), embed=(0,), head=(0,), nodes=dict.fromkeys(self.manifest.tree.nodes, (0,)))
        try:  # now rather than when it is warm
            make_policy(self.settings.policy, self.offer(LatencyProfile(nothing), 0))
        except ValueError as exc:
            raise BundleError(f"model {self.name}: policy {exc}") from exc

    @property
    def accuracies(self) -> dict[Path, float]:
        """On validation data, of the paths that are served: those of at least the depth that is set."""
        return {path: acc for path, acc in self.manifest.accuracies.items() if len(path) >= self.settings.min_depth}

    @property
    def front(self) -> tuple[Path, ...]:
        """The served paths worth running whole."""
        return pareto_front(self.manifest.tree, self.accuracies)

    @property
    def climb(self) -> tuple[Path, ...]:
        """Where rows are answered that go deeper; it ends at the best of the served paths."""
        return climb(self.manifest.tree, self.accuracies)

    def offer(self, profile: LatencyProfile, reserve_s: float) -> Offer:
        """What its policy knows of it."""
        return Offer.of(self.manifest, profile, reserve_s, self.settings.min_depth)

    def warm_up(self, max_batch: int, clock: Callable[[], float], stop: Callable[[], bool]) -> None:
        """Know how long everything takes, by `clock`: from the cache if it was measured in the same circumstances.

        Gives up, and leaves the model not warm, soon after `stop` says so.
        """
        rng = np.random.default_rng(0)
        x = rng.random((max_batch, *self.manifest.input.shape[1:]), dtype=np.float32)
        state = rng.standard_normal((max_batch, *self.manifest.state.shape[1:]), dtype=np.float32)

        def run(segment: Segment, rows: int, predict: bool) -> None:
            source = x if segment.embed else state
            self.runner.run(segment.nodes, source[:rows], embed=segment.embed, predict=predict, keep_state=not predict)

        circumstances = Circumstances(
            self.digest, processor_name(), self.runner.name, self.runner.providers, self.threads, max_batch
        )
        parts = self.cache.load(circumstances) if self.cache is not None else None
        if parts is None or set(parts.nodes) != set(self.manifest.tree.nodes) or parts.batches[-1] != max_batch:
            parts = measure_parts(run, self.manifest.tree.nodes, max_batch, clock, stop)
            if parts is None:
                return
            if self.cache is not None:
                self.cache.save(circumstances, parts)
        profile = LatencyProfile(parts)
        segments = [Segment(path, embed=True) for path in dict.fromkeys((self.front[0], self.front[-1]))]
        warm_up_profile(profile, run, segments, clock, stop)
        if not stop():
            self.profile = profile

    def latency_s(self, segment: Segment, rows: int) -> float:
        """Predicted seconds of a run; 0 while the model is not warm."""
        return self.profile.latency_s(segment, rows) if self.profile else 0.0


class Repository:
    """The served models by name: of each the highest version; a higher one that cannot be loaded is tried again.

    Args:
        load: opens a version of a model.
        root: the folder of models; none if they are all that there will be.
    """

    def __init__(
        self,
        models: Iterable[ServedModel],
        root: FilePath | None = None,
        load: Callable[[str, int], ServedModel] | None = None,
    ) -> None:
        self.models = {model.name: model for model in sorted(models, key=lambda model: model.name)}
        self._root = root
        self._load = load

    def get(self, name: str) -> ServedModel:
        """Raises `UnknownModel` with the names that are served."""
        try:
            return self.models[name]
        except KeyError:
            served = list(self.models)
            raise UnknownModel(
                f"no model {name[:80]!r} is served here: expected one of {', '.join(served)}", models=served
            ) from None

    def newest(self) -> dict[str, int]:
        """The highest version of every model in the folder.

        Raises:
            OSError: the folder cannot be read.
        """
        if self._root is None:
            return {}
        folders = [each for each in sorted(self._root.iterdir()) if each.is_dir() and _MODEL_NAME.fullmatch(each.name)]
        return {folder.name: max(versions) for folder in folders if (versions := _versions(folder))}

    def newer(self) -> list[tuple[str, int]]:
        """Models and versions in the folder that are higher than what is served, new models included.

        Raises:
            OSError: the folder cannot be read.
        """
        served = {name: model.version for name, model in self.models.items()}
        return [(name, version) for name, version in self.newest().items() if version > served.get(name, 0)]

    def load(self, name: str, version: int) -> ServedModel:
        """Open a version, without serving it yet.

        Raises:
            BundleError: it is damaged, or not whole yet; the message names the file.
        """
        assert self._load is not None
        return self._load(name, version)

    def replace(self, model: ServedModel) -> ServedModel | None:
        """Serve this version from now on; returns the one that was served until now."""
        before = self.models.get(model.name)
        self.models = dict(sorted((self.models | {model.name: model}).items()))
        return before


def open_repository(settings: Settings) -> Repository:
    """Load the highest version of every model in `settings.models`.

    Raises:
        BundleError: the folder is missing or empty, or a bundle is damaged; the message names the folder or file.
    """
    root = settings.models
    if not root.is_dir():
        raise BundleError(f"{root} is no folder: expected a model repository, MODEL/VERSION/ (make one with `hbll export`)")
    load = partial(_load, root, settings, ProfileCache(settings.cache_dir))
    models = []
    for folder in sorted(root.iterdir()):
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        if not _MODEL_NAME.fullmatch(folder.name):
            raise BundleError(f"{folder}: expected a model's name of letters, digits, '.', '_' and '-'")
        versions = _versions(folder)
        if not versions:
            raise BundleError(f"{folder} holds no version: expected a folder like {folder / '1'}")
        models.append(load(folder.name, max(versions)))
    if not models:
        raise BundleError(f"{root} holds no model: expected MODEL/VERSION/ folders (make one with `hbll export`)")
    if unknown := sorted(set(settings.per_model) - {model.name for model in models}):
        raise BundleError(f"per_model: {root} holds no model {', '.join(unknown)}")
    return Repository(models, root, load)


def _versions(folder: FilePath) -> list[int]:
    return [int(child.name) for child in folder.iterdir() if _VERSION.fullmatch(child.name)]


def _load(root: FilePath, settings: Settings, cache: ProfileCache, name: str, version: int) -> ServedModel:
    bundle = root / name / str(version)
    manifest = load_manifest(bundle)
    check_files(bundle, manifest)
    runtime = Runtime(bundle, manifest, threads=settings.threads, device=settings.device)
    digest = sha256_of(bundle / MANIFEST_FILE)
    return ServedModel(name, version, manifest, runtime, settings.of_model(name), digest, settings.threads, cache)
