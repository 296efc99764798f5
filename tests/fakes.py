"""Fakes of our own Protocols, for unit tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from family.choice import climb
from family.manifest import (
    Certificate,
    ImageInput,
    Manifest,
    Metrics,
    PathEntry,
    Provenance,
    RiskLevel,
    TensorSpec,
    file_name,
)
from family.tree import Path, Tree, format_path
from service.profile import Parts
from service.repository import ServedModel
from service.runtime import Output, Rows
from service.settings import ModelSettings

SIDE = 2


class FakeClock:
    """Monotonic seconds that move only when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class FakeRunner:
    """A runner whose confidence in label 1 is what each row's first pixel says, plus 0.1 per block of its path.

    `runs` records (nodes, rows, embed). A test can hold a run back by clearing `go`, see it begin by `began`, and do
    something of its own `before` each.
    """

    clock: FakeClock | None = None
    block_s: float = 0.0
    runs: list[tuple[Path, int, bool]] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    began: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    before: Callable[[Path], object] = lambda _: None

    def __post_init__(self) -> None:
        self.go.set()

    name = "fake 1"
    providers = ("Fake",)

    def run(self, nodes: Path, source: Rows, *, embed: bool, predict: bool = True, keep_state: bool = False) -> Output:
        self.began.set()
        self.before(nodes)
        assert self.go.wait(timeout=30)
        if self.error:
            raise self.error
        self.runs.append((nodes, len(source), embed))
        if self.clock is not None:
            self.clock.now_s += self.block_s * len(nodes)
        # the state: the row's own pixel and the number of blocks run so far
        state = np.stack([source[:, 0, 0], np.zeros(len(source))], axis=1) if embed else source.copy()
        state = state.astype(np.float32)
        state[:, 1] += len(nodes)
        confidence = np.clip(state[:, 0] + 0.1 * state[:, 1], 0.001, 0.999)
        logits = np.log(np.stack([1 - confidence, confidence], axis=1)).astype(np.float32)
        return Output(logits if predict else None, state if keep_state else None)


def fake_manifest(
    accuracies: dict[Path, float], hierarchy_depth: int = 3, levels: dict[float, float] | None = None
) -> Manifest:
    """A manifest of paths with these validation accuracies, and thresholds by certified risk; its files exist nowhere."""
    metrics = {path: Metrics(accuracy=a, loss=1, agreement=1, calibration_error=0) for path, a in accuracies.items()}
    entries = tuple(
        PathEntry(
            path=format_path(path),
            file=file_name(path),
            parameters=len(path),
            flops=len(path),
            temperature=1,
            validation=metric,
            test=metric,
        )
        for path, metric in metrics.items()
    )
    certificate = None
    if levels is not None:
        sequence = tuple(format_path(path) for path in climb(Tree(hierarchy_depth), accuracies))
        certified = tuple(RiskLevel(epsilon=epsilon, threshold=threshold) for epsilon, threshold in levels.items())
        certificate = Certificate(sequence=sequence, delta=0.05, rows=100, levels=certified)
    names = ("weights.bin", "family.onnx", *(entry.file for entry in entries))
    return Manifest(
        format_version="1.2",
        name="fake",
        hierarchy_depth=hierarchy_depth,
        input=TensorSpec(name="x", datatype="FP32", shape=(-1, SIDE, SIDE)),
        state=TensorSpec(name="state", datatype="FP32", shape=(-1, 2)),
        output=TensorSpec(name="logits", datatype="FP32", shape=(-1, 2)),
        labels=("no", "yes"),
        image=ImageInput(height=SIDE, width=SIDE),
        paths=entries,
        provenance=Provenance(
            dataset="none", method="none", seed=0, steps=0, block_evaluations=0, git_revision=None, libraries={}
        ),
        files=dict.fromkeys(names, "0" * 64),
        certificate=certificate,
    )


def rising_accuracies(tree: Tree) -> dict[Path, float]:
    """Every path, better by 0.05 with each block; the ladder's a little better than the others of its depth."""
    return {path: 0.5 + 0.05 * len(path) + 0.01 * (path in tree.ladder) for path in tree.paths()}


def fake_model(
    accuracies: dict[Path, float] | None = None,
    runner: FakeRunner | None = None,
    *,
    levels: dict[float, float] | None = None,
    version: int = 1,
    **settings: Any,
) -> ServedModel:
    """A served model behind a fake runner, not warm."""
    manifest = fake_manifest(accuracies or rising_accuracies(Tree(3)), levels=levels)
    return ServedModel("fake", version, manifest, runner or FakeRunner(), ModelSettings(**settings))


def fake_parts(nodes: Iterable[int] = range(1, 8), batches: tuple[int, ...] = (1, 8), block_s: float = 0.001) -> Parts:
    """`block_s` a block, whatever the batch, and nothing else."""
    nothing = (0.0,) * len(batches)
    return Parts(
        batches=batches,
        call=nothing,
        embed=nothing,
        head=nothing,
        nodes={node: (block_s,) * len(batches) for node in nodes},
    )


def rows(*confidences: float) -> Rows:
    """Inputs for a `FakeRunner`."""
    x = np.zeros((len(confidences), SIDE, SIDE), np.float32)
    x[:, 0, 0] = confidences
    return x
