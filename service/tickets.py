"""Requests in flight and their rows, as the engine knows them: with the client who waits, the data, the answers so far."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from service.answers import Answer, OnAnswer, RowAnswer
from service.policy.state import Row
from service.repository import ServedModel
from service.runtime import Rows
from service.tracing import Timed


@dataclass(slots=True, eq=False)
class Ticket:
    """A request in flight. `answered_s`: when the latest of its rows' first answers was known."""

    model: ServedModel
    arrived_s: float
    done: asyncio.Future[Answer]
    answers: list[RowAnswer | None]
    on_answer: OnAnswer | None
    on_loop: bool
    spans: list[Timed] | None
    rows: list[TicketRow] = field(default_factory=list)
    queue_s: float | None = None
    compute_s: float = 0.0
    answered_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Audit:
    """Why a row runs that no client waits for: to know what the certified rule says where the deadline cut it short
    (`early` is none), or what the reference path says to a row that was answered `early`."""

    epsilon: float
    early: int | None


@dataclass(slots=True, eq=False, kw_only=True)
class TicketRow(Row):
    """A row of a ticket, or of an audit: `x (*input_shape)`, and its `state` after the blocks that it has been through.
    `audited`: at its end it is to be audited."""

    model: ServedModel
    x: Rows
    ticket: Ticket | None = None
    index: int = 0
    state: Rows | None = None
    latest: RowAnswer | None = None
    audited: bool = False
    audit: Audit | None = None
