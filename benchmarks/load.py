"""An open-loop HTTP client: it sends every request at its time, whatever has become of those before it.

A general client costs more than a millisecond of CPU per request, which at thousands of requests a second would make
the client the thing that is measured. This one is an asyncio protocol around httptools' parser: requests are put into
bytes before the first is sent, connections are kept alive, carry one request at a time, and grow in number when all are
busy. What it sends and when is decided by its caller.

Latency counts from the *scheduled* arrival, so that neither a late client nor a busy server can hide waiting
(coordinated omission). How late the client itself was is in the outcomes, too: see `lateness`.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from benchmarks.alarm import Alarm

_MAX_IDLE_S = 3.0
"""A connection that was idle for longer is not used again: uvicorn closes them after 5 s, and a request that crosses
with the close would be lost through no fault of the server."""

_LATE_S = 0.001

_MAX_FILES = 10_240
"""As many as macOS allows."""


@dataclass(frozen=True, slots=True)
class Request:
    """A POST of `body` to `target`, path and query, `at_s` after the start of the replay."""

    at_s: float
    body: bytes
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request, in seconds from the start of the replay.

    Attributes:
        scheduled_s: when it should have been sent.
        sent_s: when it was: written to a free connection, or one was begun to be opened for it.
        done_s: when the answer was complete, or had failed.
        status: the status of the answer, if there is a whole one.
        body: and its body.
        error: else, why there is none.
    """

    scheduled_s: float
    sent_s: float
    done_s: float
    status: int | None
    body: bytes | None
    error: str | None

    @property
    def latency_s(self) -> float:
        """From the scheduled arrival."""
        return self.done_s - self.scheduled_s

    @property
    def ok(self) -> bool:
        """It was answered, with status 200."""
        return self.status == 200


OnSent = Callable[[int], None]


async def replay(
    host: str,
    port: int,
    requests: Sequence[Request],
    on_sent: OnSent | None = None,
    *,
    timeout_s: float = 30.0,
    connections: int = 16,
) -> list[Outcome]:
    """Send each request at its time and wait for all answers: the outcome of each, in the order of the requests.

    What goes wrong with a connection or an answer is an outcome, too; no request is sent twice. An answer must be framed
    by its Content-Length or chunks, as those of every HTTP/1.1 server that keeps connections alive.

    Args:
        host: name or address of the server.
        port: its port.
        requests: in the order of their times.
        on_sent: called with the index of each request as soon as it is sent; must be quick. What it raises ends the
            replay.
        timeout_s: after this time from its sending, a request without an answer is given up.
        connections: how many to open before the start.

    Raises:
        ValueError: the requests are not in the order of their times.
    """
    if any(later.at_s < earlier.at_s for earlier, later in itertools.pairwise(requests)):
        raise ValueError("requests: expected them in the order of their times")
    run = _Replay(host, port, requests, timeout_s)
    alarm = Alarm()
    try:
        await run.open_idle(min(connections, len(requests)))
        with _no_collections():
            run.start_s = time.monotonic()
            for index, request in enumerate(requests):
                if time.monotonic() < run.start_s + request.at_s:  # else it goes with those before it, without a switch
                    await alarm.until(run.start_s + request.at_s)
                run.send(index)
                if on_sent is not None:
                    on_sent(index)
            return await run.all_outcomes()
    finally:
        alarm.close()
        await run.close()


def run_replay(
    host: str,
    port: int,
    requests: Sequence[Request],
    on_sent: OnSent | None = None,
    *,
    timeout_s: float = 30.0,
    connections: int = 16,
) -> list[Outcome]:
    """`replay` in a loop of its own, uvloop's where it is installed."""
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with suppress(ModuleNotFoundError):  # Windows
        import uvloop

        new_event_loop = uvloop.new_event_loop
    allow_many_connections()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(replay(host, port, requests, on_sent, timeout_s=timeout_s, connections=connections))


def allow_many_connections() -> None:
    """Raise this process's limit of open files: the usual 1,024 are soon used up by a server that queues, and the
    failures would look like its own."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows, where there is no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def lateness(outcomes: Sequence[Outcome], late_s: float = _LATE_S) -> float:
    """The share of requests that the client sent more than `late_s` after their time. Above 1 %, by the default, the
    measurement says something about the client, and is void."""
    if not outcomes:
        raise ValueError("outcomes: expected at least one")
    return sum(outcome.sent_s - outcome.scheduled_s > late_s for outcome in outcomes) / len(outcomes)


class _Replay:
    """The state of one replay: payloads, connections, outcomes."""

    def __init__(self, host: str, port: int, requests: Sequence[Request], timeout_s: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.timeout_s = timeout_s
        self.start_s = 0.0
        self.payloads = _payloads(f"{host}:{port}".encode(), requests)
        self.connections: set[_Connection] = set()
        # Last in, first out, so that those not needed grow old.
        self.idle: list[_Connection] = []
        self._address = (host, port)
        self._requests = requests
        self._sent_s = [0.0] * len(requests)
        self._outcomes: list[Outcome | None] = [None] * len(requests)
        self._open = len(requests)
        self._finished = asyncio.Event()
        self._openings: set[asyncio.Task[None]] = set()

    async def open_idle(self, count: int) -> None:
        """Open connections in advance. One that fails is not missed: its request will say so."""
        await asyncio.gather(*(self._connect(_Connection(self)) for _ in range(count)))
        for connection in self.idle[:1]:  # the name need not be looked up again
            self._address = connection.peer()

    def send(self, index: int) -> None:
        """Send a request on the connection last used, or a new one."""
        now = time.monotonic()
        self._sent_s[index] = now - self.start_s
        while self.idle:
            connection = self.idle.pop()
            if connection.usable(now):
                connection.send(index)
                return
            connection.abort()
        connection = _Connection(self)
        connection.send(index)
        opening = self.loop.create_task(self._connect(connection))
        self._openings.add(opening)
        opening.add_done_callback(self._openings.discard)

    def record(self, index: int, status: int | None, body: bytes | None, error: str | None) -> None:
        """The end of a request."""
        assert self._outcomes[index] is None
        done_s = time.monotonic() - self.start_s
        self._outcomes[index] = Outcome(self._requests[index].at_s, self._sent_s[index], done_s, status, body, error)
        self._open -= 1
        if self._open == 0:
            self._finished.set()

    async def all_outcomes(self) -> list[Outcome]:
        """When there is one of each request."""
        if self._open:
            await self._finished.wait()
        return [outcome for outcome in self._outcomes if outcome is not None]

    async def close(self) -> None:
        """Drop all connections."""
        for opening in self._openings:
            opening.cancel()
        await asyncio.gather(*self._openings, return_exceptions=True)
        for connection in tuple(self.connections):
            connection.abort()
        await asyncio.sleep(0)  # transports close in the next turn of the loop

    async def _connect(self, connection: _Connection) -> None:
        try:
            async with asyncio.timeout(self.timeout_s):
                await self.loop.create_connection(lambda: connection, *self._address)
        except OSError as exc:  # TimeoutError is one
            connection.fail(f"no connection: {exc}")


class _Connection(asyncio.Protocol):
    """A connection with at most one request in flight. It may be given one before it is open."""

    __slots__ = ("_body", "_idle_since_s", "_index", "_parser", "_run", "_timer", "_transport")

    def __init__(self, run: _Replay) -> None:
        self._run = run
        self._transport: asyncio.Transport | None = None
        self._parser = HttpResponseParser(self)
        self._body: list[bytes] = []
        self._index: int | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._idle_since_s = 0.0

    def usable(self, now: float) -> bool:
        """Open, and not idle for so long that the server may be about to close it."""
        assert self._transport is not None
        return not self._transport.is_closing() and now - self._idle_since_s <= _MAX_IDLE_S

    def peer(self) -> tuple[str, int]:
        assert self._transport is not None
        address, port, *_ = self._transport.get_extra_info("peername")
        return address, port

    def send(self, index: int) -> None:
        self._index = index
        self._timer = self._run.loop.call_later(self._run.timeout_s, self._time_out)
        if self._transport is not None:
            self._transport.write(self._run.payloads[index])

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def fail(self, error: str) -> None:
        """End the request in flight, if there is one, and the connection."""
        self.abort()
        index = self._index
        if index is not None:
            self._end()
            self._run.record(index, None, None, error)

    def _end(self) -> None:
        assert self._timer is not None
        self._timer.cancel()
        self._index = None

    def _rest(self) -> None:
        self._idle_since_s = time.monotonic()
        self._run.idle.append(self)

    def _time_out(self) -> None:
        self.fail(f"no answer within {self._run.timeout_s:g} s")

    # asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._run.connections.add(self)
        if self._index is None:
            self._rest()
        else:
            self._transport.write(self._run.payloads[self._index])

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as exc:
            self.fail(f"not an answer in HTTP/1.1: {exc}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._run.connections.discard(self)
        self.fail(f"the connection was lost before the answer was complete: {exc or 'closed by the server'}")

    # httptools calls these

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        body = b"".join(self._body)
        self._body.clear()
        if status < 200:
            return  # interim: the answer is still to come
        index = self._index
        if index is None:
            self.abort()  # nobody asked
            return
        self._end()
        assert self._transport is not None
        if self._parser.should_keep_alive():
            self._rest()
        else:
            self._transport.close()
        self._run.record(index, status, body, None)


def _payloads(host: bytes, requests: Sequence[Request]) -> list[bytes]:
    """Each request as it goes over the wire. Equal ones share their bytes: traces repeat few bodies often."""
    built: dict[tuple[bytes, bytes, tuple[tuple[bytes, bytes], ...]], bytes] = {}
    payloads = []
    for request in requests:
        key = (request.target, request.body, request.headers)
        if key not in built:
            headers = ((b"Host", host), (b"Content-Length", b"%d" % len(request.body)), *request.headers)
            lines = b"".join(b"%b: %b\r\n" % header for header in headers)
            built[key] = b"POST %b HTTP/1.1\r\n%b\r\n%b" % (request.target, lines, request.body)
        payloads.append(built[key])
    return payloads


@contextmanager
def _no_collections() -> Iterator[None]:
    """Without Python's garbage collector, whose full collections would stop the client for tens of milliseconds."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
