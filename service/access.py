"""ASGI middleware around all others: a request's arrival, its id, its line in the access log, and the answer to errors
that nobody expected. What the line tells of the answer, `HttpArrival` notes.

It logs no bodies, no queries, no headers and of API keys the name.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.answers import Answer
from service.errors import NotReady, ServiceError
from service.keyring import Key
from service.logs import ACCESS_LOGGER, request_id
from service.responses import error_response, on_unknown_error

HEADER = "X-Request-Id"
_HEADER = HEADER.lower().encode()
_SANE = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")

logger = logging.getLogger(ACCESS_LOGGER)


class Access:
    """Gives every request `arrived_s`, on the monotonic clock, from which budgets run, and `request_id` in its `state`.

    A client's own X-Request-Id is kept if it is sane: at most 128 letters, digits and ._:/+=@-; it comes back as a header.
    With `log` each request is logged when its answer has been sent; the server's own, to warm up, are not.
    """

    def __init__(self, app: ASGIApp, *, log: bool) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state: dict[str, Any] = scope.setdefault("state", {})
        state.setdefault("arrived_s", time.monotonic())  # there already if `service.listener` listens
        state["request_id"] = id_of(next((value for name, value in scope["headers"] if name == _HEADER), None))
        own = state["request_id"].encode()
        token = request_id.set(state["request_id"])
        try:
            if self._log and "internal" not in state:
                await self._logged(scope, receive, send, own)
            else:
                await self._answer(scope, receive, send, own)
        finally:
            request_id.reset(token)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, own: bytes) -> None:
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), (_HEADER, own)]
            await send(message)

        refused = scope["state"].get("refused")
        if refused is not None:
            await error_response(refused, scope)(scope, receive, send_with_id)
            return
        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # the server ends, and has waited for this request as long as it may
            if not started:
                refused = NotReady("the server is shutting down, and this took longer than it waits")
                await error_response(refused, scope)(scope, receive, send_with_id)
            raise
        except Exception as exc:
            if started:  # the server logs it and cuts the connection: that is all that can be said now
                raise
            response = await on_unknown_error(Request(scope), exc)
            await response(scope, receive, send_with_id)

    async def _logged(self, scope: Scope, receive: Receive, send: Send, own: bytes) -> None:
        status: int | None = None  # nobody was there any more to get one
        bytes_in = bytes_out = 0

        async def counted_receive() -> Message:
            nonlocal bytes_in
            message = await receive()
            bytes_in += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            nonlocal status, bytes_out
            status = message.get("status", status)
            bytes_out += len(message.get("body", b""))
            await send(message)

        try:
            await self._answer(scope, counted_receive, counted_send, own)
        finally:
            route = getattr(scope.get("route"), "path", None)  # the template: what is asked for may be anything
            model = scope.get("path_params", {}).get("model")
            found = {"model": model, "status": status, "bytes_in": bytes_in, "bytes_out": bytes_out}
            log_request(scope["state"] | found, scope["method"], route)


class HttpArrival:
    """The `Arrival` of a `service.call.Call` that came by HTTP. `service.listener` hears of its budget, too."""

    __slots__ = ("_request", "arrived_s")

    leaving: ClassVar[tuple[type[BaseException], ...]] = ()  # `service.presence` raises `ClientGone`

    def __init__(self, request: Request) -> None:
        self._request = request
        self.arrived_s: float = request.state.arrived_s

    def note(self, answer: Answer, deadline_met: bool | None, budget_ms: float | None) -> None:
        """See `Arrival`."""
        self._request.scope["state"].update(answer=answer, deadline_met=deadline_met, budget_ms=budget_ms)

    def note_expired(self, budget_ms: float) -> None:
        """See `Arrival`."""
        self._request.scope["state"].update(answer=None, budget_ms=budget_ms)

    def span(self, error: ServiceError | None) -> tuple[str, dict[str, str | int], str | None]:
        """See `Arrival`."""
        method, route = self._request.method, self._request.scope["route"].path
        attributes: dict[str, str | int] = {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": 200 if error is None else error.status,
        }
        return f"{method} {route}", attributes, self._request.headers.get("traceparent")


def id_of(given: bytes | None) -> str:
    """The id of a request whose client has `given` one: that, if it is sane, else a new one."""
    return (
        given.decode() if given is not None and _SANE.fullmatch(given) else f"{random.getrandbits(128):032x}"
    )  # no secret


def log_request(state: Mapping[str, Any], method: str | None, route: str | None) -> None:
    """Write a line of the access log, by whatever protocol the request came. Its `state` has its `request_id` and when it
    arrived, and what was found out meanwhile: `model`, `key`, `answer`, `deadline_met`, `status`, `bytes_in`, `bytes_out`.
    """
    answer: Answer | None = state.get("answer")
    rows = answer.rows if answer is not None else ()
    key: Key | None = state.get("key")
    model = state.get("model")
    line = {
        "request_id": state["request_id"],
        "method": method,
        "route": route,
        "duration_ms": round((time.monotonic() - state["arrived_s"]) * 1000, 3),
        "model": model[:80] if isinstance(model, str) else None,
        "depth": max((len(row.path) for row in rows), default=None),
        "stopped_by": ",".join(sorted({row.stopped_by for row in rows if row.stopped_by})) or None,
        "deadline_met": state.get("deadline_met"),
        "key": key.name if key is not None else None,
        "status": state.get("status"),
        "bytes_in": state.get("bytes_in"),
        "bytes_out": state.get("bytes_out"),
    }
    logger.info("", extra=line)
