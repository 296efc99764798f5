"""Writing a bundle: choose the paths, calibrate them, write graphs and weights, verify, and only then let it appear."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path as FilePath

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from export.calibrate import fit_temperature, measure
from export.graph import Parts, Placement, export_parts, gated_graph, path_graph, place
from export.verify import Difference, verify_bundle
from family.choice import pareto_front, reference_path
from family.manifest import (
    FORMAT_VERSION,
    GATED_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    BundleError,
    ImageInput,
    Manifest,
    PathEntry,
    Provenance,
    TensorSpec,
    dump_manifest,
    file_name,
    sha256_of,
)
from family.tree import Cost, Path, Tree, format_path
from training.checkpoint import Progress
from training.config import RunConfig
from training.data import Digits, Split
from training.evaluate import path_logits
from training.model import CLASSES, IMAGE_SIDE, Family
from training.trainer import trained_paths

_MOST_PATHS_BY_DEFAULT = 32
_LIBRARIES = ("torch", "onnx", "onnxscript", "numpy", "mlxtend")


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export made."""

    manifest: Manifest
    differences: list[Difference]


def export_bundle(
    config: RunConfig,
    family: Family,
    progress: Progress,
    data: Digits,
    target: FilePath,
    *,
    paths: str = "default",
    replace: bool = False,
    advance: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write the bundle of a trained family to the folder `target`.

    Requires: `target` does not exist, or `replace`. Ensures: `target` is a whole, verified bundle; on any failure
    it is what it was before. A kill leaves nothing half-written (between the two renames of a replacement, the old
    bundle beside it, under a name that ends in `.old`).

    Args:
        paths: `ladder`, `pareto`, `all`, a list like `4,4-6-7`, or `default` (all where there are at most 32, else
            the Pareto front and the ladder).
        advance: told of every finished step.

    Raises:
        BundleError: `target` exists, or the graphs do not agree with each other and with torch.
        InvalidPath: `paths` names a path that the tree does not have.
    """
    if target.exists() and not replace:
        raise BundleError(f"{target} already exists: choose another folder or version, or add --replace")
    validation = _logits(family, data.validation, trained_paths(config, family.tree, tuple(family.tree.paths())))
    accuracies = {path: _accuracy(logits, data.validation) for path, logits in validation.items()}
    chosen = choose_paths(family.tree, accuracies, paths)
    advance("chose the paths")

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    _remove_leftovers(target)
    temporary.mkdir()
    try:
        parts = export_parts(family, data.validation.images[:2], advance)
        _write_graphs(temporary, parts, place(parts.initializers), chosen, advance)
        entries = _entries(
            family, chosen, validation, data, reference_path(family.tree, {p: accuracies[p] for p in chosen})
        )
        advance("calibrated")
        names = (WEIGHTS_FILE, GATED_FILE, *(file_name(path) for path in chosen))
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            name=config.name,
            hierarchy_depth=family.tree.hierarchy_depth,
            input=TensorSpec(name="x", datatype="FP32", shape=(-1, *parts.input_shape)),
            state=TensorSpec(name="state", datatype="FP32", shape=(-1, *parts.state_shape)),
            output=TensorSpec(name="logits", datatype="FP32", shape=(-1, parts.classes)),
            labels=tuple(str(digit) for digit in range(CLASSES)),
            image=ImageInput(height=IMAGE_SIDE, width=IMAGE_SIDE),
            paths=entries,
            provenance=_provenance(config, progress),
            files={name: sha256_of(temporary / name) for name in names},
        )
        differences = verify_bundle(temporary, manifest, family, lambda path: advance(f"verified {format_path(path)}"))
        _write(temporary / MANIFEST_FILE, dump_manifest(manifest))
        _publish(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(manifest, differences)


def steps_of_export(family: Family, paths: int) -> int:
    """How often `export_bundle` calls `advance` when it writes `paths` paths."""
    return len(family.tree.nodes) + 6 + 2 * paths


def choose_paths(tree: Tree, accuracies: dict[Path, float], wish: str) -> tuple[Path, ...]:
    """The paths to export, shallowest first, from validation accuracies of all trained paths.

    Raises:
        InvalidPath: the wish names a path that the tree does not have.
        BundleError: it names a path that this run did not train.
    """
    trained_rungs = [path for path in tree.ladder if path in accuracies]
    chosen: Iterable[Path]
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
    for path in chosen:
        if path not in accuracies:
            raise BundleError(f"this run did not train the path {format_path(path)}")
    return tuple(sorted(set(chosen), key=lambda path: (len(path), path)))


def costs(family: Family) -> tuple[Cost, Cost]:
    """FLOPs of one row (matrix products, a multiply-add counts two) and parameters, by part."""
    example = torch.zeros(1, IMAGE_SIDE, IMAGE_SIDE)
    with torch.no_grad():
        state = family.embed(example)
        flops = Cost(
            _flops(lambda: family.embed(example)),
            {node: _flops(lambda node=node: family.blocks.at(node, state)) for node in family.tree.nodes},  # type: ignore[misc]
            _flops(lambda: family.head(state)),
        )
        sizes = {node: sum(w.numel() for w in family.blocks.of(node).values()) for node in family.tree.nodes}
    embed, head = (sum(p.numel() for p in part.parameters()) for part in (family.embed, family.head))
    return flops, Cost(embed, sizes, head)


def _flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


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


def _entries(
    family: Family, paths: tuple[Path, ...], validation: dict[Path, NDArray[np.float32]], data: Digits, reference: Path
) -> tuple[PathEntry, ...]:
    flops, parameters = costs(family)
    test = _logits(family, data.test, paths)
    entries = []
    for path in paths:
        labels = data.validation.labels.numpy()
        temperature = fit_temperature(validation[path], labels)
        entries.append(
            PathEntry(
                path=format_path(path),
                file=file_name(path),
                parameters=parameters.of(path),
                flops=flops.of(path),
                temperature=temperature,
                validation=measure(validation[path], labels, validation[reference], temperature),
                test=measure(test[path], data.test.labels.numpy(), test[reference], temperature),
            )
        )
    return tuple(entries)


def _logits(family: Family, split: Split, paths: Iterable[Path]) -> dict[Path, NDArray[np.float32]]:
    return {path: logits.numpy() for path, logits in path_logits(family, split.images, paths).items()}


def _accuracy(logits: NDArray[np.float32], split: Split) -> float:
    return float((logits.argmax(axis=1) == split.labels.numpy()).mean())


def _provenance(config: RunConfig, progress: Progress) -> Provenance:
    return Provenance(
        dataset=f"{config.data.name}, shift {config.data.shift}",
        method=config.train.method,
        seed=config.train.seed,
        steps=progress.steps,
        block_evaluations=progress.evaluations,
        git_revision=_git_revision(),
        libraries={name: version(name) for name in _LIBRARIES},
    )


def _git_revision() -> str | None:
    """The revision of the source tree that exports, or none for an installed package."""
    root = FilePath(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None


def _write(file: FilePath, data: bytes) -> None:
    with file.open("wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())


def _publish(temporary: FilePath, target: FilePath) -> None:
    """Rename into place. An old bundle steps aside first and goes only when the new one stands."""
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


def _remove_leftovers(target: FilePath) -> None:
    """Delete what killed exports to the same target left behind."""
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
