"""What the engine answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from family.tree import Path
from service.policy.wish import StoppedBy
from service.tracing import Timed


@dataclass(frozen=True, slots=True)
class RowAnswer:
    """One row's answer: `probabilities (classes,) float32`, temperature-scaled, their `argmax` and its probability.

    `stopped_by` is none for an answer on the way to a deeper one. `logits (classes,) float32` are the network's own.
    """

    label: int
    confidence: float
    probabilities: NDArray[np.float32]
    path: Path
    stopped_by: StoppedBy | None
    logits: NDArray[np.float32]


OnAnswer = Callable[[int, RowAnswer], None]
"""Told of every answer of a row, by its index, as soon as it is known."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A request's answer: one entry per row in the order they came, and where its time went. All rows had some answer at
    `answered_s` on the engine's clock, and it was final at `decided_s`. `spans` only for traces."""

    rows: tuple[RowAnswer, ...]
    queue_s: float
    compute_s: float
    answered_s: float
    decided_s: float
    spans: tuple[Timed, ...] = ()
