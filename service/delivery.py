"""Brings to those who wait what was decided, what is known on the way, and what went wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

from service.answers import Answer, RowAnswer
from service.dispatch import Dispatch, Turn
from service.errors import DeadlineExpired, DeadlineInfeasible, ServiceError
from service.metrics import Metrics
from service.policy.wish import StoppedBy
from service.tickets import Ticket, TicketRow
from service.tracing import Timed


class Delivery:
    """Ends requests. `on_final` is told of every row that has its final answer, and why it has its depth."""

    def __init__(self, dispatch: Dispatch, metrics: Metrics, on_final: Callable[[TicketRow, StoppedBy], None]) -> None:
        self._dispatch = dispatch
        self._metrics = metrics
        self._on_final = on_final

    def deliver(self, turn: Turn, told: Iterable[TicketRow] = ()) -> None:
        """Let clients know what was decided; those of rows that are `told` also an answer that is not the final one."""
        for decision in turn.decisions:
            for row, stopped_by in cast(Sequence[tuple[TicketRow, StoppedBy]], decision.done):
                self._answer(row, stopped_by, turn.decided_s)
            for row in cast(Sequence[TicketRow], decision.expired):
                self.fail([row], DeadlineExpired("the latency budget ran out in the queue, before any block had run"))
            for row in cast(Sequence[TicketRow], decision.refused):
                if row.ticket is not None:
                    by_s = self._dispatch.feasible_s(row.model, row.wish, 1)
                    self._dispatch.learn_of_refusal(row.model)
                    self.fail([row], infeasible(row.deadline_s, by_s, row.ticket.arrived_s))
        for row in told:
            ticket = row.ticket
            if ticket is None or ticket.on_answer is None or ticket.done.done() or ticket.answers[row.index] is not None:
                continue  # its client has gone, or was told already that this is the final one
            assert row.latest is not None
            ticket.on_answer(row.index, row.latest)

    def fail(self, rows: Iterable[TicketRow], error: ServiceError) -> None:
        """Refuse the requests of these rows."""
        for row in rows:
            ticket = row.ticket
            if ticket is None:
                self._dispatch.leave(row)
            elif not ticket.done.done():
                ticket.done.set_exception(error)
                self.leave(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Take all rows of a request out of the policy."""
        for row in ticket.rows:
            self._dispatch.leave(row)

    def _answer(self, row: TicketRow, stopped_by: StoppedBy, decided_s: float) -> None:
        """A row has its final answer."""
        assert row.latest is not None
        ticket = row.ticket
        if ticket is not None and ticket.done.done():
            return
        self._on_final(row, stopped_by)
        if ticket is None:
            return
        latest = row.latest
        answer = RowAnswer(latest.label, latest.confidence, latest.probabilities, latest.path, stopped_by, latest.logits)
        ticket.answers[row.index] = answer
        metrics = self._metrics
        metrics.of(metrics.answers, *row.model.labels, str(len(answer.path)), stopped_by).inc()
        if ticket.on_answer is not None:
            ticket.on_answer(row.index, answer)
        answers = [answer for answer in ticket.answers if answer is not None]
        if len(answers) == len(ticket.answers):
            queue_s = ticket.queue_s or 0.0
            metrics.of(metrics.queue_seconds, *row.model.labels).observe(queue_s)
            metrics.of(metrics.compute_seconds, *row.model.labels).observe(ticket.compute_s)
            spans = ticket.spans
            if spans is not None:
                spans.insert(0, Timed("queue", ticket.arrived_s, ticket.arrived_s + queue_s))
            times_s = queue_s, ticket.compute_s, ticket.answered_s, decided_s
            ticket.done.set_result(Answer(tuple(answers), *times_s, tuple(spans or ())))


def infeasible(deadline_s: float, by_s: float, arrived_s: float) -> DeadlineInfeasible:
    """The refusal of a request that arrived at `arrived_s` and could have an answer at `by_s`."""
    smallest_ms = round(1000 * (by_s - arrived_s), 3)
    return DeadlineInfeasible(
        f"a budget of {1000 * (deadline_s - arrived_s):g} ms cannot be met now: expected at least {smallest_ms:g} ms",
        smallest_feasible_budget_ms=smallest_ms,
    )
