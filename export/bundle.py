"""Writing a bundle: choose the paths, calibrate them, write graphs and weights, verify, and only then let it appear."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path as FilePath

import numpy as np
from numpy.typing import NDArray

from export.certify import DELTA, certify, disagreements
from export.graph import Parts, Placement, export_parts, gated_graph, path_graph, place
from export.verify import Difference, verify_bundle
from family.choice import pareto_front, reference_path
from family.manifest import (
    FORMAT_VERSION,
    GATED_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    BundleError,
    Certificate,
    Manifest,
    PathEntry,
    Provenance,
    RiskLevel,
    TensorSpec,
    dump_manifest,
    file_name,
    sha256_of,
)
from family.tree import Path, Tree, format_path
from training.calibrate import Answers, answers, fit_temperature, measure
from training.checkpoint import Origin, Progress
from training.config import RunConfig
from training.cost import costs
from training.dataset import Dataset, Split
from training.evaluate import path_logits
from training.methods import trained_paths
from training.model import Family

_MOST_PATHS_BY_DEFAULT = 32


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export made."""

    manifest: Manifest
    differences: list[Difference]


def export_bundle(
    config: RunConfig,
    family: Family,
    progress: Progress,
    origin: Origin,
    data: Dataset,
    target: FilePath | str,
    *,
    paths: str = "default",
    replace: bool = False,
    report: Callable[[str, int], None] = lambda _step, _total: None,
) -> Exported:
    """Write the bundle of a trained family to the folder `target`.

    Requires: `target` does not exist, or is a bundle and `replace` is set. Ensures: `target` is a whole, verified
    bundle; on any failure it is what it was before. A kill leaves nothing half-written there; what it leaves beside,
    under hidden names, the next export to the same target puts right.

    Args:
        paths: `ladder`, `pareto`, `all`, a list like `4,4-6-7`, or `default` (all where there are at most 32, else
            the Pareto front and the ladder).
        report: told of every finished step and of how many there will be.

    Raises:
        BundleError: `target` exists, the family gives NaN, or the graphs do not agree with each other and torch.
        InvalidPath: `paths` names a path that the tree does not have.
    """
    target = FilePath(target).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    _put_leftovers_right(target)
    _require_free(target, replace)
    trained = trained_paths(config, family.tree, tuple(family.tree.paths()))
    accuracies = {path: _accuracy(logits, data.validation) for path, logits in _logits(family, data.validation, trained)}
    chosen = choose_paths(family.tree, accuracies, paths)
    steps = 6 + 2 * len(chosen)  # parts, weights, gated graph, two of metrics; each path twice

    def advance(step: str) -> None:
        report(step, steps)

    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    temporary.mkdir()
    try:
        parts = export_parts(family, data.validation.x[:2])
        advance("parts")
        _write_graphs(temporary, parts, place(parts.initializers), chosen, advance)
        entries = _entries(family, chosen, data, reference_path(family.tree, {p: accuracies[p] for p in chosen}))
        advance("calibrated")
        names = (WEIGHTS_FILE, GATED_FILE, *(file_name(path) for path in chosen))
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            name=config.name,
            hierarchy_depth=family.tree.hierarchy_depth,
            input=TensorSpec(
                name="x", datatype="INT64" if data.spec.vocabulary else "FP32", shape=(-1, *parts.input_shape)
            ),
            state=TensorSpec(name="state", datatype="FP32", shape=(-1, *parts.state_shape)),
            output=TensorSpec(name="logits", datatype="FP32", shape=(-1, parts.classes)),
            labels=data.spec.labels,
            image=data.spec.image,
            features=data.spec.features,
            normalisation=data.spec.normalisation,
            vocabulary=data.spec.vocabulary,
            paths=entries,
            provenance=_provenance(config, data, progress, origin),
            files={name: sha256_of(temporary / name) for name in names},
        )
        if len(data.certification):
            certificate = _certificate(family, manifest, data.certification)
            manifest = Manifest.model_validate(manifest.model_dump() | {"certificate": certificate.model_dump()})
        advance("certified")
        differences = verify_bundle(temporary, manifest, family, lambda path: advance(f"verified {format_path(path)}"))
        _write(temporary / MANIFEST_FILE, dump_manifest(manifest))
        _publish(temporary, target, replace)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(manifest, differences)


def choose_paths(tree: Tree, accuracies: dict[Path, float], wish: str) -> tuple[Path, ...]:
    """The paths to export, shallowest first, from validation accuracies of all trained paths.

    Raises:
        InvalidPath: the wish names a path that the tree does not have.
        BundleError: it names a path that this run did not train, or there is none of the kind.
    """
    trained_rungs = [path for path in tree.ladder if path in accuracies]
    chosen: Collection[Path]
    if wish == "default":
        wish = "all" if len(accuracies) <= _MOST_PATHS_BY_DEFAULT else "pareto+ladder"
    match wish:
        case "all":
            chosen = accuracies
        case "pareto":
            chosen = pareto_front(tree, accuracies)
        case "ladder":
            chosen = trained_rungs
        case "pareto+ladder":
            chosen = (*pareto_front(tree, accuracies), *trained_rungs)
        case _:
            chosen = [tree.parse(text.strip()) for text in wish.split(",")]
    if not chosen:
        raise BundleError(f"this run trained no path of the {wish}: it has {', '.join(map(format_path, accuracies))}")
    for path in chosen:
        if path not in accuracies:
            raise BundleError(f"this run did not train the path {format_path(path)}")
    return tuple(sorted(set(chosen), key=lambda path: (len(path), path)))


def _write_graphs(
    folder: FilePath, parts: Parts, placement: Placement, paths: tuple[Path, ...], advance: Callable[[str], None]
) -> None:
    with (folder / WEIGHTS_FILE).open("wb") as file:
        for name, offset in placement.offsets.items():
            file.seek(offset)
            file.write(np.ascontiguousarray(parts.initializers[name]).tobytes())
        file.truncate(placement.size)
        file.flush()
        os.fsync(file.fileno())
    advance("weights")
    _write(folder / GATED_FILE, gated_graph(parts, placement).SerializeToString())
    advance("gated graph")
    for path in paths:
        _write(folder / file_name(path), path_graph(parts, path, placement).SerializeToString())
        advance(file_name(path))


def _entries(family: Family, paths: tuple[Path, ...], data: Dataset, reference: Path) -> tuple[PathEntry, ...]:
    flops, parameters = costs(family, data.validation.x[:1])
    labels = data.validation.labels.numpy()
    temperatures: dict[Path, float] = {}
    validation: dict[Path, Answers] = {}
    for path, logits in _logits(family, data.validation, paths):
        temperatures[path] = fit_temperature(logits, labels)
        validation[path] = answers(logits, labels, temperatures[path])
    test = _answers(family, data.test, temperatures)
    return tuple(
        PathEntry(
            path=format_path(path),
            file=file_name(path),
            parameters=parameters.of(path),
            flops=flops.of(path),
            temperature=temperatures[path],
            validation=measure(validation[path], validation[reference]),
            test=measure(test[path], test[reference]),
        )
        for path in paths
    )


def _certificate(family: Family, manifest: Manifest, split: Split) -> Certificate:
    """On the certification split, which nothing else looks at."""
    found = _answers(family, split, {path: manifest.offered[path].temperature for path in manifest.climb})
    confidences = np.stack([found[path].confidence for path in manifest.climb])
    given = np.stack([found[path].answer for path in manifest.climb])
    levels = certify(disagreements(confidences, given), len(split))
    return Certificate(
        sequence=tuple(map(format_path, manifest.climb)),
        delta=DELTA,
        rows=len(split),
        levels=tuple(RiskLevel(epsilon=level.epsilon, threshold=level.threshold) for level in levels),
    )


def _answers(family: Family, split: Split, temperatures: Mapping[Path, float]) -> dict[Path, Answers]:
    labels = split.labels.numpy()
    return {path: answers(logits, labels, temperatures[path]) for path, logits in _logits(family, split, temperatures)}


def _logits(family: Family, split: Split, paths: Iterable[Path]) -> Iterator[tuple[Path, NDArray[np.float32]]]:
    for path, logits in path_logits(family, split.x, paths):
        if not logits.isfinite().all():
            raise BundleError(f"path {format_path(path)} of this family gives NaN or infinity: it cannot be served")
        yield path, logits.numpy()


def _accuracy(logits: NDArray[np.float32], split: Split) -> float:
    return float((logits.argmax(axis=1) == split.labels.numpy()).mean())


def _provenance(config: RunConfig, data: Dataset, progress: Progress, origin: Origin) -> Provenance:
    return Provenance(
        dataset=data.spec.description,
        method=config.train.method,
        seed=config.train.seed,
        steps=progress.steps,
        block_evaluations=progress.evaluations,
        git_revision=origin.git_revision,
        libraries=origin.libraries | {name: version(name) for name in ("onnx", "onnxscript")},
    )


def _write(file: FilePath, data: bytes) -> None:
    with file.open("wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())


def _require_free(target: FilePath, replace: bool) -> None:
    """Only a bundle is ever replaced: `models/digits` given for `models/digits/1` must not cost all versions."""
    if not target.exists():
        return
    if not replace:
        raise BundleError(f"{target} already exists: choose another folder or version, or add --replace")
    if not (target / MANIFEST_FILE).is_file():
        raise BundleError(f"{target} exists and is no bundle, so it is not replaced: expected a {MANIFEST_FILE} in it")


def _publish(temporary: FilePath, target: FilePath, replace: bool) -> None:
    """Rename into place. An old bundle steps aside first and goes only when the new one stands."""
    _require_free(target, replace)
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.rename(aside)
    try:
        temporary.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _put_leftovers_right(target: FilePath) -> None:
    """After exports to the same target that were killed: an old bundle comes back if nothing took its place, what is
    half-written goes. Those of live processes are theirs."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)\.(new|old)")
    for leftover in target.parent.iterdir():
        match = pattern.fullmatch(leftover.name)
        if match is None or _is_alive(int(match[1])):
            continue
        if match[2] == "old" and not target.exists():
            leftover.rename(target)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    """Whether another process has this number. What bears our own is left by one that had it before: in a container, where
    numbers begin anew, the next export often has the same."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
