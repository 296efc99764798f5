"""Sends the requests of calls: within their deadlines, again where that may help, and twice where that was asked for. It
knows HTTP and the clock, and not what is asked."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import anyio.abc
import httpx

from hbll.client.attempts import Attempts
from hbll.client.errors import DeadlineExceeded, HbllError, InvalidRequest, Unavailable
from hbll.client.requests import Request, content_of

T = TypeVar("T")


@dataclass(slots=True)
class Call:
    """One call on its way: its time, its id, how many requests were sent for its answer, and what the latest met."""

    attempts: Attempts
    request_id: str
    sent: int = 0
    failure: HbllError | None = None


class Sender:
    """Sends to `http`, after `hedge_after_s` twice."""

    def __init__(self, http: httpx.AsyncClient, hedge_after_s: float | None) -> None:
        self._http = http
        self._hedge_after_s = hedge_after_s

    @contextmanager
    def deadline(self, call: Call) -> Iterator[None]:
        """Ends what is within when the call has to be over; errors carry the call's id."""
        try:
            with anyio.fail_after(call.attempts.left_s(time.monotonic())):
                yield
        except TimeoutError as exc:
            error = DeadlineExceeded(f"no answer from {self._http.base_url} within {call.attempts.timeout_s:g} s")
            error.request_id = call.request_id
            raise error from call.failure or exc
        except HbllError as error:
            error.request_id = call.request_id
            raise

    @contextmanager
    def reached(self) -> Iterator[None]:
        """httpx's errors as ours."""
        try:
            yield
        except (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.InvalidURL) as exc:
            raise InvalidRequest(f"{self._http.base_url} cannot be asked: {exc}") from exc
        except httpx.HTTPError as exc:
            raise Unavailable(
                f"no answer from {self._http.base_url}: {exc or type(exc).__name__}. "
                "Is a server running there? Start one with `hbll serve`"
            ) from exc

    async def ask(self, call: Call, request: Request, *, hedge: bool = False) -> dict[str, Any]:
        """The answer to a request, in as many attempts as it takes and the call allows.

        Raises:
            HbllError: what the last of them met.
        """
        if hedge and self._hedge_after_s is not None:
            return await self._again(call, lambda: self._hedged(call, request))
        return await self._again(call, lambda: self._send(call, request))

    async def open(self, call: Call, request: Request) -> httpx.Response:
        """The same for an answer that is to be read as it comes: open, and for the caller to close."""
        return await self._again(call, lambda: self._send_open(call, request))

    async def _again(self, call: Call, attempt: Callable[[], Awaitable[T]]) -> T:
        """`attempt`, until one succeeds or there should be no other."""
        while True:
            try:
                return await attempt()
            except HbllError as error:
                call.failure = error
                wait_s = call.attempts.wait_s(error, time.monotonic(), random.random())  # noqa: S311
                if wait_s is None:
                    raise
            await anyio.sleep(wait_s)

    async def _send(self, call: Call, request: Request) -> dict[str, Any]:
        """One request's answer."""
        response = await self._send_open(call, request)
        try:
            with self.reached():
                body = await response.aread()
        finally:
            with anyio.CancelScope(shield=True):
                await response.aclose()
        return content_of(response.status_code, body)

    async def _send_open(self, call: Call, request: Request) -> httpx.Response:
        """One request, with what is left of the budget; the response is open, and no error."""
        if request.method == "POST":
            request = request.within(call.attempts.budget_left_ms(time.monotonic()))
            call.sent += 1
        with self.reached():
            built = self._http.build_request(
                request.method,
                request.path,
                params=request.query,
                headers={"X-Request-Id": call.request_id, **request.headers},
                content=request.body,
            )
            response = await self._http.send(built, stream=True)
            if response.status_code != 200:
                try:
                    body = await response.aread()
                finally:
                    await response.aclose()
                content_of(response.status_code, body, response.headers.get("retry-after"))  # raises
        return response

    async def _hedged(self, call: Call, request: Request) -> dict[str, Any]:
        """The first success of two requests; the second is sent `hedge_after_s` later, unless the first is over."""
        answers: list[dict[str, Any]] = []
        errors: list[Exception] = []
        one_came = anyio.Event()
        running = 0

        async def run(group: anyio.abc.TaskGroup) -> None:
            nonlocal running
            running += 1
            try:
                answers.append(await self._send(call, request))
            except Exception as error:  # noqa: BLE001  raised below: out of the group it would come as one of a group
                errors.append(error)
            running -= 1
            one_came.set()
            if running == 0 or answers:
                group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(run, group)
            with anyio.move_on_after(self._hedge_after_s):
                await one_came.wait()
            if not one_came.is_set():
                group.start_soon(run, group)
        if answers:  # and the other may have failed in the same turn of the loop
            return answers[0]
        raise errors[-1]
