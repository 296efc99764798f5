from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest

from benchmarks import load
from benchmarks.load import Outcome, Request, lateness, replay, run_replay

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextmanager
def answering() -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A uvicorn process and its port, which listens from the start: what is sent before it is up waits in its backlog."""
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listening:
        port = listening.getsockname()[1]
        command = [sys.executable, "-m", "tests.benchmarks.answering", str(listening.fileno())]
        process = subprocess.Popen(command, pass_fds=[listening.fileno()], cwd=Path(__file__).parents[2])
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with answering() as (_, port):
        yield port


@asynccontextmanager
async def raw_server(handler: Handler) -> AsyncIterator[int]:
    """In the client's own loop: full control of every byte."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError):  # the client hung up
                await handler(reader, writer)
        finally:
            writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    return head, await reader.readexactly(int(length.split(b":")[1]))


def spaced(count: int, target: bytes, gap_s: float = 0.001) -> list[Request]:
    return [Request(index * gap_s, b"body %d" % index, target) for index in range(count)]


def in_uvloop(*arguments, **options) -> list[Outcome]:
    return run_replay("127.0.0.1", *arguments, **options)


def in_asyncio(*arguments, **options) -> list[Outcome]:
    return asyncio.run(replay("127.0.0.1", *arguments, **options))


each_loop = pytest.mark.parametrize("run", [in_uvloop, in_asyncio])


@each_loop
@pytest.mark.parametrize("target", [b"/echo", b"/echo?query=1", b"/chunks", b"/close"])
def test_every_request_has_the_outcome_of_its_own_answer_in_order(run, target: bytes, port: int) -> None:
    requests = spaced(300, target)
    outcomes = run(port, requests)
    assert [outcome.error for outcome in outcomes] == [None] * 300
    assert [(outcome.status, outcome.body) for outcome in outcomes] == [(200, request.body) for request in requests]
    assert [outcome.scheduled_s for outcome in outcomes] == [request.at_s for request in requests]
    assert all(outcome.scheduled_s <= outcome.sent_s <= outcome.done_s for outcome in outcomes)


@each_loop
def test_requests_that_are_due_together_go_together(run, port: int) -> None:
    requests = [Request(0.0, b"%d" % index, b"/echo") for index in range(200)]
    assert [outcome.body for outcome in run(port, requests)] == [request.body for request in requests]


@each_loop
@pytest.mark.parametrize("status", [204, 400, 429, 503])
def test_refusals_keep_their_status_and_body(run, status: int, port: int) -> None:
    body = b"" if status == 204 else b"why"
    outcomes = run(port, [Request(index / 1000, body, b"/status/%d" % status) for index in range(20)])
    assert {(outcome.status, outcome.body, outcome.error, outcome.ok) for outcome in outcomes} == {
        (status, body, None, False)
    }


def test_headers_are_sent() -> None:
    async def echo_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, _ = await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(head), head))

    async def main() -> None:
        async with raw_server(echo_head) as port:
            request = Request(0.0, b"{}", b"/a?b=c", ((b"Content-Type", b"application/json"), (b"X-One", b"1")))
            (outcome,) = await replay("127.0.0.1", port, [request])
            assert outcome.body is not None
            assert outcome.body.split(b"\r\n") == [
                b"POST /a?b=c HTTP/1.1",
                b"Host: 127.0.0.1:%d" % port,
                b"Content-Length: 2",
                b"Content-Type: application/json",
                b"X-One: 1",
                b"",
                b"",
            ]

    asyncio.run(main())


def test_no_request_waits_for_the_answers_of_others() -> None:
    """The server answers none before it has all 50; it gets them on as many connections, though only 3 were open."""
    count = 50

    async def main() -> list[Outcome]:
        barrier = asyncio.Barrier(count)

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            _, body = await read_request(reader)
            await barrier.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            await reader.read()

        async with raw_server(handler) as port:
            return await replay("127.0.0.1", port, spaced(count, b"/"), connections=3)

    assert [outcome.body for outcome in asyncio.run(main())] == [b"body %d" % index for index in range(count)]


@pytest.mark.parametrize("kept", [True, False])
def test_connections_are_used_again_unless_they_idled_for_long(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kept:
        monkeypatch.setattr(load, "_MAX_IDLE_S", -1.0)
    opened = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        while True:
            await read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async def main() -> list[Outcome]:
        async with raw_server(handler) as port:
            return await replay("127.0.0.1", port, spaced(100, b"/", gap_s=0.005), connections=0)

    assert all(outcome.ok for outcome in asyncio.run(main()))
    assert len(opened) < 100 if kept else len(opened) == 100


def test_an_interim_answer_is_not_the_answer() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nyes")

    async def main() -> list[Outcome]:
        async with raw_server(handler) as port:
            return await replay("127.0.0.1", port, spaced(3, b"/"))

    assert [(outcome.status, outcome.body) for outcome in asyncio.run(main())] == [(200, b"yes")] * 3


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"SSH-2.0-OpenSSH_9.9\r\n", "not an answer in HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", "the connection was lost before the answer was complete"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "the connection was lost before the answer was complete"),
        (b"", "the connection was lost before the answer was complete: closed by the server"),
    ],
)
def test_a_broken_answer_is_an_error(answer: bytes, error: str) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer)

    async def main() -> list[Outcome]:
        async with raw_server(handler) as port:
            return await replay("127.0.0.1", port, spaced(5, b"/"))

    outcomes = asyncio.run(main())
    assert len(outcomes) == 5
    for outcome in outcomes:
        assert outcome.status is outcome.body is None
        assert outcome.error is not None
        assert outcome.error.startswith(error)


@each_loop
def test_a_server_that_is_killed_loses_no_outcome(run) -> None:
    with answering() as (process, port):
        assert all(outcome.ok for outcome in run(port, spaced(20, b"/echo")))  # it is up

        def kill(index: int) -> None:
            if index == 100:
                process.kill()
                process.wait()

        outcomes = run(port, spaced(200, b"/echo"), kill)
    assert len(outcomes) == 200
    for outcome in outcomes:
        assert outcome.ok == (outcome.error is None)
    assert all(outcome.error for outcome in outcomes[101:])


@each_loop
def test_where_nobody_listens_every_outcome_is_an_error(run) -> None:
    with socket.socket() as nobody:  # bound and not listening
        nobody.bind(("127.0.0.1", 0))
        outcomes = run(nobody.getsockname()[1], spaced(20, b"/echo"))
    assert len(outcomes) == 20
    assert all(outcome.error is not None and outcome.error.startswith("no connection") for outcome in outcomes)


@each_loop
def test_a_request_without_an_answer_is_given_up(run, port: int) -> None:
    outcomes = run(port, spaced(20, b"/never"), timeout_s=0.05)
    assert {outcome.error for outcome in outcomes} == {"no answer within 0.05 s"}
    assert all(outcome.done_s - outcome.sent_s >= 0.049 for outcome in outcomes)  # loops' timers are good to a millisecond


@each_loop
def test_on_sent_is_told_of_each_request_and_can_end_the_replay(run, port: int) -> None:
    sent: list[int] = []
    run(port, spaced(30, b"/echo"), sent.append)
    assert sent == list(range(30))

    def stop(index: int) -> None:
        if index == 3:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run(port, spaced(30, b"/never"), stop)


def test_requests_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="in the order of their times"):
        asyncio.run(replay("127.0.0.1", 1, [Request(1.0, b"", b"/"), Request(0.5, b"", b"/")]))


@each_loop
def test_no_requests_have_no_outcomes(run, port: int) -> None:
    assert run(port, []) == []


def outcome(scheduled_s: float, sent_s: float, done_s: float, status: int | None = 200) -> Outcome:
    return Outcome(scheduled_s, sent_s, done_s, status, b"", None if status else "lost")


def test_lateness_is_the_share_of_all_that_were_sent_late() -> None:
    outcomes = [
        outcome(1.0, 1.0, 1.010),
        outcome(2.0, 2.002, 2.005),  # late, and yet in time
        outcome(3.0, 3.0005, 3.030),
        outcome(4.0, 4.0, 4.001, 503),
        outcome(5.0, 5.0, 5.001, None),
    ]
    assert lateness(outcomes) == 0.2
    assert lateness(outcomes, late_s=0.0001) == 0.4


def test_lateness_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        lateness([])
