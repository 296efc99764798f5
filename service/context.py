"""What all routes share: the parts that the app hands them, and the errors that openapi.yaml lists."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request

from service.decoding import Decoding
from service.engine import Engine
from service.keys import Keys
from service.metrics import Metrics
from service.oip.rpc.gate import CallGate
from service.repository import Repository, ServedModel
from service.schemas import Error
from service.settings import Settings
from service.tracing import Tracer


@dataclass(slots=True)
class Context:
    """What the app hands to its routes. `loading`: versions come and go one at a time. `told_to_end`: by a signal, of which
    the engine, that still answers what is open, hears later."""

    settings: Settings
    repository: Repository
    engine: Engine
    metrics: Metrics
    tracer: Tracer | None
    keys: Keys | None
    call_gate: CallGate
    decoding: Decoding
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    warm: bool = False
    told_to_end: bool = False

    @property
    def ready(self) -> bool:
        """Every model is loaded and warm, and the engine lives."""
        return self.warm and self.engine.ready

    @property
    def ending(self) -> bool:
        """Whether what is not ready by now need not become so."""
        return self.told_to_end or self.engine.stopping

    def answers(self, served: ServedModel) -> bool:
        """Whether this version of a model answers now."""
        return self.ready and served.profile is not None


def context_of(request: Request) -> Context:
    """The app's parts, for a route that does without FastAPI's dependencies."""
    context: Context = request.app.state.context
    return context


async def _context(request: Request) -> Context:  # FastAPI would run a plain function in a thread, for every request
    return context_of(request)


Ctx = Annotated[Context, Depends(_context)]


def errors(*statuses: int, needs_key: bool = True) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that can answer with these errors, and those that any can: of the connection, and of API
    keys if it `needs_key`."""
    meanings = {
        400: "The body, a base64 string or an image cannot be parsed; in /v2 also tensors or outputs that the model lacks",
        401: "An API key is needed here, and there was none or an unknown one",
        403: "The API key is not an operator's",
        404: "No such model, or not in this version",
        408: "The body did not arrive in time",
        413: "The body is too long",
        415: "A content type or encoding that is not read",
        422: "Well-formed and not valid: a shape, a range, a depth or path that is not offered",
        429: "Too many rows wait already (`queue_full`), or the API key has had its share (`rate_limited`)",
        431: "The URL and headers are too long",
        500: "The server met an error of its own",
        503: "Warming up, shutting down or stuck, or too many connections are open",
        504: "The budget ran out before any block had run, or a strict request's cannot be met",
    }
    possible = {*statuses, 431, 503} | ({401, 429} if needs_key else set()) | ({408} if 413 in statuses else set())
    return {status: {"model": Error, "description": meanings[status]} for status in sorted(possible)}


def milliseconds(seconds: float) -> float:
    """Seconds as the HTTP interface tells them: in milliseconds, to the microsecond."""
    return round(seconds * 1000, 3)
