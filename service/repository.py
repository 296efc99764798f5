"""The model repository: a folder of `MODEL/VERSION/` bundles, checked and loaded before anything is served."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Protocol

import numpy as np

from family.choice import climb, pareto_front
from family.manifest import MANIFEST_FILE, WEIGHTS_FILE, BundleError, Manifest, check_files, load_manifest, sha256_of
from family.names import MODEL_NAME, is_model_name, is_version
from family.tree import Path
from service.errors import UnknownModel, UnknownVersion
from service.memory import grown_bytes, resident_bytes
from service.policy import parse_policy
from service.policy.state import Offer
from service.profile import LatencyProfile, Segment, measure_parts, warm_up_profile
from service.profile_cache import Circumstances, ProfileCache, processor_name
from service.runtime import Output, Rows, Runtime
from service.settings import ModelSettings, Settings
from service.version_policy import choose

logger = logging.getLogger(__name__)


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

    `weights_bytes` is the size of its weights' file. `grown_bytes` is by how much the process grew while this was loaded
    and warmed up, for whatever reason; none where the system does not tell.

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
    weights_bytes: int = 0
    grown_bytes: int | None = None

    def __post_init__(self) -> None:
        deepest = max(map(len, self.manifest.offered))
        if self.settings.min_depth > deepest:
            raise BundleError(
                f"model {self.name}: expected min_depth to be at most {deepest}, the deepest offered path, "
                f"got {self.settings.min_depth}"
            )
        try:  # now rather than when it is warm
            parse_policy(self.settings.policy, self.accuracies)
        except ValueError as exc:
            raise BundleError(f"model {self.name}: policy {exc}") from exc

    @property
    def labels(self) -> tuple[str, str]:
        """What its metrics are labelled by: model and version."""
        return self.name, str(self.version)

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
        resident = resident_bytes()
        rng = np.random.default_rng(0)
        shape, tokens = (max_batch, *self.manifest.input.shape[1:]), self.manifest.vocabulary
        x: Rows = rng.random(shape, dtype=np.float32) if tokens is None else rng.integers(tokens, size=shape)
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
        grown = grown_bytes(resident)
        self.grown_bytes = None if self.grown_bytes is None or grown is None else self.grown_bytes + grown
        if not stop():
            self.profile = profile

    def latency_s(self, segment: Segment, rows: int) -> float:
        """Predicted seconds of a run; 0 while the model is not warm."""
        return self.profile.latency_s(segment, rows) if self.profile else 0.0


class Repository:
    """The served models in their served versions, and the folder that they come from.

    Args:
        load: opens a version of a model.
        root: the folder of models; none if they are all that there will be.

    Attributes:
        refused: by model the versions in the folder that should be served and cannot be, with the reason.
        stale: by model the versions that are served as they were when loaded, and what has become of their folders.
        unloaded: by model the versions that were served until an operator unloaded it, with that for a reason.
    """

    def __init__(
        self,
        models: Iterable[ServedModel],
        root: FilePath | None = None,
        load: Callable[[str, int], ServedModel] | None = None,
    ) -> None:
        self._models: dict[str, dict[int, ServedModel]] = {}
        self._root = root
        self._load = load
        self.refused: dict[str, dict[int, str]] = {}
        self.stale: dict[str, dict[int, str]] = {}
        self.unloaded: dict[str, dict[int, str]] = {}
        for model in models:
            self.add(model)

    @property
    def models(self) -> dict[str, ServedModel]:
        """By name: of each model the highest version, which answers where none is named."""
        return {name: next(iter(versions.values())) for name, versions in self._models.items()}

    @property
    def served(self) -> list[ServedModel]:
        """All models in all their versions, the highest first."""
        return [model for versions in self._models.values() for model in versions.values()]

    def versions(self, name: str) -> dict[int, ServedModel]:
        """The served versions of a model, the highest first. Raises `UnknownModel` with the names that are served."""
        try:
            return self._models[name]
        except KeyError:
            served = list(self._models)
            if name in self.unloaded:
                raise UnknownModel(f"{name} was unloaded: an operator's `load` serves it again", models=served) from None
            expected = f": expected one of {', '.join(served)}" if served else ", nor any other"
            raise UnknownModel(f"no model {name[:80]!r} is served here{expected}", models=served) from None

    def get(self, name: str, version: str | None = None) -> ServedModel:
        """A model in this version, else in its highest.

        Raises:
            UnknownModel: with the names that are served.
            UnknownVersion: with the versions that are served.
        """
        versions = self.versions(name)
        for model in versions.values():
            if version is None or version == str(model.version):
                return model
        served = [str(each) for each in versions]
        raise UnknownVersion(
            f"version {(version or '')[:20]!r} of {name} is not served here: expected {' or '.join(served)}",
            versions=served,
        )

    def names_found(self) -> list[str]:
        """The models in the folder.

        Raises:
            OSError: it cannot be read.
        """
        folders = [] if self._root is None else sorted(self._root.iterdir())
        return [folder.name for folder in folders if is_model_name(folder.name) and folder.is_dir()]

    def versions_found(self, name: str) -> list[int]:
        """The versions of a model in the folder; none if there is no such model.

        Raises:
            OSError: it cannot be read.
        """
        if self._root is None or not is_model_name(name) or not (self._root / name).is_dir():
            return []
        return _versions(self._root / name)

    def is_changed(self, model: ServedModel) -> bool:
        """Whether the folder of a served version has another bundle by now, or none that can be read."""
        if self._root is None or not model.digest:
            return False
        try:
            return sha256_of(self._root / model.name / str(model.version) / MANIFEST_FILE) != model.digest
        except OSError:
            return True

    def load(self, name: str, version: int) -> ServedModel:
        """Open a version, without serving it yet.

        Raises:
            BundleError: it is damaged, or not whole yet; the message names the file.
        """
        assert self._load is not None
        return self._load(name, version)

    def add(self, model: ServedModel) -> None:
        """Serve this version from now on, beside the others."""
        versions = self._models.get(model.name, {}) | {model.version: model}
        self._models[model.name] = dict(sorted(versions.items(), reverse=True))
        self._models = dict(sorted(self._models.items()))

    def remove(self, model: ServedModel) -> None:
        """Serve this version no more. It is not the last of its model: see `unload`."""
        versions = self._models[model.name]
        assert len(versions) > 1
        self._models[model.name] = {version: each for version, each in versions.items() if each is not model}

    def unload(self, name: str) -> list[ServedModel]:
        """Serve no version of this model any more, nor refuse any. Returns those that were served: none if it is unloaded
        already. Raises `UnknownModel` if it was never served."""
        if name in self.unloaded:
            return []
        served = self.versions(name)
        del self._models[name]
        self.refused.pop(name, None)
        self.stale.pop(name, None)
        self.unloaded[name] = dict.fromkeys(served, "unloaded")
        return list(served.values())


def open_repository(settings: Settings) -> Repository:
    """Load of every model in `settings.models` the versions that its settings choose.

    Raises:
        BundleError: the folder is missing or empty, or a bundle is damaged; the message names the folder or file. With
            `poll_s` 0 also: settings are for a model or a version that is not there.
    """
    root = settings.models
    if not root.is_dir():
        raise BundleError(f"{root} is no folder: expected a model repository, MODEL/VERSION/ (make one with `hbll export`)")
    if (root / MANIFEST_FILE).exists():
        raise BundleError(f"{root} is one bundle: expected the folder of all models, {root.absolute().parent.parent}")
    load = partial(_load, root, settings, ProfileCache(settings.cache_dir))
    models: list[ServedModel] = []
    for folder in sorted(root.iterdir()):
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        if not is_model_name(folder.name):
            raise BundleError(f"{folder}: expected a model's name, {MODEL_NAME}")
        found = _versions(folder)
        if not found:
            if (folder / MANIFEST_FILE).exists():
                raise BundleError(f"{root} is one model: expected the folder of all models, {root.absolute().parent}")
            raise BundleError(f"{folder} holds no version: expected a folder like {folder / '1'}")
        models.extend(load(folder.name, version) for version in _choose(settings, folder, found))
    if not models:
        raise BundleError(
            f"{root} holds no model: expected MODEL/VERSION/ folders (`hbll export RUN {root}/MODEL/1` makes one of a run)"
        )
    names = dict.fromkeys(model.name for model in models)
    if unknown := sorted(set(settings.per_model) - set(names)):
        _say_missing(settings, f"per_model: {root} holds no model {', '.join(unknown)}, only {', '.join(names)}")
    return Repository(models, root, load)


def _choose(settings: Settings, folder: FilePath, found: Collection[int]) -> list[int]:
    """The versions of a model to begin with."""
    wanted = settings.of_model(folder.name).versions
    chosen = choose(wanted, found)
    there = ", ".join(map(str, sorted(found)))
    if not chosen:
        raise BundleError(f"model {folder.name}: {folder} holds none of the versions {wanted}, only {there}")
    if isinstance(wanted, tuple) and (missing := sorted(set(wanted) - set(found))):
        named = ", ".join(map(str, missing))
        _say_missing(settings, f"model {folder.name}: {folder} does not hold version {named}, only {there}")
    return chosen


def _say_missing(settings: Settings, message: str) -> None:
    """What is named and not there may come later, if it is looked for; else it is a mistake."""
    if settings.poll_s == 0:
        raise BundleError(message)
    logger.warning("%s: is that a mistake? If it comes later, it is served as set", message)


def _versions(folder: FilePath) -> list[int]:
    return [int(child.name) for child in folder.iterdir() if is_version(child.name)]


def _load(root: FilePath, settings: Settings, cache: ProfileCache, name: str, version: int) -> ServedModel:
    bundle = root / name / str(version)
    resident = resident_bytes()
    manifest = load_manifest(bundle)
    check_files(bundle, manifest)
    runtime = Runtime(bundle, manifest, threads=settings.threads, device=settings.device)
    model = ServedModel(
        name,
        version,
        manifest,
        runtime,
        settings.of_model(name),
        sha256_of(bundle / MANIFEST_FILE),
        settings.threads,
        cache,
        weights_bytes=(bundle / WEIGHTS_FILE).stat().st_size,
    )
    model.grown_bytes = grown_bytes(resident)
    return model
