"""What an engine answers, and what the routes need of one: between `service.engine` and HTTP, so that either can change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from family.tree import Path
from service.drift import DriftWatch
from service.policy.state import Step
from service.policy.wish import StoppedBy, Wish
from service.repository import ServedModel
from service.runtime import Rows
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


class Engine(Protocol):
    """What the routes need of an engine."""

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        ...

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop."""
        ...

    async def start(self, models: Sequence[ServedModel]) -> None:
        """Warm up the models, then take requests."""
        ...

    async def stop(self) -> None:
        """Take no more requests and end."""
        ...

    def require_room(self, rows: int) -> None:
        """Raise what `submit` would raise for that many rows now."""
        ...

    def add(self, model: ServedModel) -> None:
        """Serve one more model, which is warm."""
        ...

    def retire(self, model: ServedModel) -> None:
        """Forget a model once the last of its rows has been answered; there are no more audits of it."""
        ...

    def drift(self, model: ServedModel) -> DriftWatch | None:
        """The alarms of a model; none while it is not warm."""
        ...

    def foresee(self, model: ServedModel, wish: Wish, rows: int) -> tuple[Step, ...]:
        """The answers that such a request could expect now."""
        ...

    async def submit(
        self,
        model: ServedModel,
        x: Rows,
        wish: Wish,
        arrived_s: float,
        on_answer: OnAnswer | None = None,
        *,
        on_loop: bool = True,
    ) -> Answer:
        """See `service.engine.Engine.submit`."""
        ...
