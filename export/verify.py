"""Verification: every path as its own graph, through the gated graph, in parts, and in torch gives the same logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as FilePath

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from family.manifest import GATED_FILE, BundleError, Manifest
from family.tree import Path, format_path
from training.evaluate import path_logits
from training.model import Family
from training.shapes import ShapeError, shapes_of

TOLERANCE = 1e-4
"""Greatest accepted absolute difference of two logits, float32."""

BATCHES = (1, 3, 16)

Inputs = NDArray[np.float32] | NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Difference:
    """Greatest absolute differences of a path's logits: its own graph against the gated graph, against the gated
    graph stopped and continued in its middle, and against torch (none without a checkpoint)."""

    path: Path
    gated: float
    continued: float
    torch: float | None


def verify_bundle(
    bundle: FilePath, manifest: Manifest, family: Family | None, advance: Callable[[Path], None]
) -> list[Difference]:
    """Check all graphs of `bundle` with onnx and compare every offered path in all its forms at several batch sizes.

    Raises:
        BundleError: a graph is not valid ONNX, or two forms differ by more than `TOLERANCE`.
    """
    if family is not None:
        _require_run_of(bundle, manifest, family)
    for name in (GATED_FILE, *(entry.file for entry in manifest.paths)):
        try:
            onnx.checker.check_model(str(bundle / name), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
            raise BundleError(f"{bundle / name} is not a valid ONNX graph: {exc}") from exc
    gated = _session(bundle / GATED_FILE)
    inputs = [_examples(manifest, rows) for rows in BATCHES]
    expected = [dict(path_logits(family, torch.from_numpy(x), manifest.offered)) for x in inputs] if family else None
    differences = []
    for path, entry in manifest.offered.items():
        own = _session(bundle / entry.file)
        gated_error = continued_error = torch_error = 0.0
        for index, x in enumerate(inputs):
            (logits,) = own.run(["logits"], {"x": x})
            whole, _ = _run_gated(gated, manifest, path, x)
            half = len(path) // 2
            _, state = _run_gated(gated, manifest, path[:half], x, predict=False)
            continued, _ = _run_gated(gated, manifest, path[half:], state, embed=False)
            gated_error = max(gated_error, _largest(logits, whole))
            continued_error = max(continued_error, _largest(logits, continued))
            if expected is not None:
                torch_error = max(torch_error, _largest(logits, expected[index][path].numpy()))
        difference = Difference(path, gated_error, continued_error, torch_error if expected is not None else None)
        for form, error in (("gated graph", gated_error), ("continued run", continued_error), ("torch model", torch_error)):
            if error > TOLERANCE:
                raise BundleError(
                    f"{bundle / entry.file}: path {format_path(path)} and the {form} differ by {error:.2g}, "
                    f"expected at most {TOLERANCE:g}"
                )
        differences.append(difference)
        advance(path)
    return differences


def _require_run_of(bundle: FilePath, manifest: Manifest, family: Family) -> None:
    """That the family can be compared: it has the tree, takes the rows and gives the classes of the bundle."""
    if family.tree != manifest.tree:
        expected_depth, got_depth = manifest.hierarchy_depth, family.tree.hierarchy_depth
        raise BundleError(
            f"{bundle} has hierarchy depth {expected_depth}, the checkpoint {got_depth}: not the run it is from"
        )
    try:
        classes = shapes_of(family, torch.from_numpy(_examples(manifest, 2))).classes
    except ShapeError as exc:
        rows = list(manifest.input.shape[1:])
        raise BundleError(f"{bundle} takes rows of {rows}, the checkpoint others: not the run it is from ({exc})") from exc
    if classes != len(manifest.labels):
        raise BundleError(f"{bundle} has {len(manifest.labels)} classes, the checkpoint {classes}: not the run it is from")


def _examples(manifest: Manifest, rows: int) -> Inputs:
    """Random inputs `(rows, *input_shape)` of the size that the training data have."""
    rng = np.random.default_rng(0)
    shape = manifest.input.shape[1:]
    if manifest.vocabulary is not None:
        return rng.integers(manifest.vocabulary, size=(rows, *shape))
    if manifest.image is not None or manifest.normalisation is None:
        return rng.random((rows, *shape), dtype=np.float32)
    over_row = (-1, *[1] * (len(shape) - 1))
    mean, std = (
        np.array(v, np.float32).reshape(over_row) for v in (manifest.normalisation.mean, manifest.normalisation.std)
    )
    return mean + std * rng.standard_normal((rows, *shape), dtype=np.float32)


def _session(file: FilePath) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    try:
        return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as exc:
        raise BundleError(f"{file} cannot be loaded by ONNX Runtime: {exc}") from exc


def _run_gated(
    session: ort.InferenceSession,
    manifest: Manifest,
    nodes: Path,
    source: Inputs,
    *,
    embed: bool = True,
    predict: bool = True,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    empty_x = np.zeros((0, *manifest.input.shape[1:]), manifest.input.code)
    empty_state = np.zeros((0, *manifest.state.shape[1:]), np.float32)
    visit = np.zeros(len(manifest.tree.nodes), np.bool_)
    visit[[node - 1 for node in nodes]] = True
    feeds = {
        "x": source if embed else empty_x,
        "state": empty_state if embed else source,
        "visit": visit,
        "embed": np.array(embed),
        "predict": np.array(predict),
    }
    logits, state = session.run(["logits", "state_out"], feeds)
    return logits, state


def _largest(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The greatest absolute difference; infinite if the shapes differ or a value is not finite."""
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.abs(a - b).max())
