"""The audits that are still to be run, and what follows from each.

They wait here, outside of the policies, so that they take no client's place: until an idle moment, or for so long that
they are done beside clients' rows. What they find goes to `service.drift`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from service.drift import DriftWatch
from service.policy.wish import StoppedBy, Wish
from service.repository import ServedModel
from service.tickets import Audit, TicketRow

PATIENCE_S = 60.0
"""How long an audit waits for an idle moment."""


class Audits:
    """A queue of rows that no client waits for. `order` numbers them, `clock` is the engine's."""

    def __init__(self, order: Callable[[], int], clock: Callable[[], float]) -> None:
        self._order = order
        self._clock = clock
        self._waiting: deque[TicketRow] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def overdue(self, now_s: float) -> bool:
        """Whether the oldest has waited long enough."""
        return bool(self._waiting) and self._waiting[0].patient_until_s <= now_s

    def take(self) -> TicketRow:
        """The oldest, which is to be run now."""
        return self._waiting.popleft()

    def forget(self, model: ServedModel) -> None:
        """No more audits of this model."""
        self._waiting = deque(row for row in self._waiting if row.model is not model)

    def answered(self, row: TicketRow, stopped_by: StoppedBy, drift: DriftWatch) -> None:
        """A row that is to be audited, or an audit's own, has its answer: report it, or take it one step further."""
        assert row.latest is not None
        audit, label, reference = row.audit, row.latest.label, row.model.manifest.reference
        if audit is not None and audit.early is not None:
            drift.observe(audit.epsilon, differs=label != audit.early)
        elif row.latest.path == reference:  # nothing was left early
            drift.observe(_epsilon(row), differs=False)
        elif stopped_by == "risk":
            self._add(row, replace(row.wish, path=reference, exit_at=None, asked_as="path"), label)
        else:
            self.cut_short(row)

    def cut_short(self, row: TicketRow) -> None:
        """A row that is to be audited did not come to the end of its climb: let it."""
        self._add(row, row.wish, None)

    def _add(self, row: TicketRow, wish: Wish, early: int | None) -> None:
        patient = replace(wish, deadline_s=None, strict=False, priority=0, patience_s=PATIENCE_S)
        audit = Audit(_epsilon(row), early)
        self._waiting.append(TicketRow(patient, self._clock(), self._order(), model=row.model, x=row.x, audit=audit))


def _epsilon(row: TicketRow) -> float:
    epsilon = row.audit.epsilon if row.audit is not None else row.wish.risk
    assert epsilon is not None  # only certified rows are audited
    return epsilon
