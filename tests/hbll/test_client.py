"""The client against answers that are made up: what it sends, how often, and what it makes of what comes back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import anyio
import anyio.lowlevel
import httpx
import numpy as np
import pytest

from hbll.client import (
    Answer,
    AsyncClient,
    Client,
    DeadlineExceeded,
    HbllError,
    InvalidRequest,
    NotServed,
    Prediction,
    Readiness,
    Refused,
    Rung,
    ServerFailed,
    Unavailable,
    UnexpectedAnswer,
)
from hbll.client.answers import read_answer

ROW = np.zeros((2, 2), np.float32)
PREDICTION = {"label": "6", "confidence": 0.9, "depth": 1, "path": "4", "stopped_by": "complete", "certified": None}
TIMES = {"queue_ms": 0.1, "compute_ms": 0.2, "total_ms": 0.4}
ANSWER = {"model": "m", "version": 1, "predictions": [PREDICTION], "deadline_met": None, "risk": None, **TIMES}
MODEL = {"name": "m", "version": 1, "ready": True, "hierarchy_depth": 2, "input_shape": [2, 2], "labels": ["6"],
         "reference": "4", "climb": ["4"], "risk_levels": [], "paths": []}  # fmt: skip


def error(status: int, code: str = "some_code", **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"error": "a sentence", "code": code}, headers=headers)


def sse(*events: tuple[str, dict[str, object]]) -> httpx.Response:
    text = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
    return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})


class Server:
    """Answers predictions with `answers`, in order, and tells what it was asked."""

    def __init__(self, *answers: httpx.Response | Exception | Callable[[], Awaitable[httpx.Response]]) -> None:
        self.answers = list(answers)
        self.asked: list[httpx.Request] = []
        self.looked_up: list[str] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET" and "predict" not in request.url.path:
            self.looked_up.append(request.url.path)
            listed = {"models": [MODEL]}
            return httpx.Response(200, json=listed if request.url.path == "/v1/models" else MODEL)
        self.asked.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return await answer() if callable(answer) else answer

    def client(self, **options: object) -> Client:
        return Client("http://test", transport=httpx.MockTransport(self), **options)  # type: ignore[arg-type]

    @property
    def budgets(self) -> list[float]:
        return [float(request.headers["X-Latency-Budget-Ms"]) for request in self.asked]


def ok(**changes: object) -> httpx.Response:
    return httpx.Response(200, json=ANSWER | changes)


def test_an_answer_is_data_and_members_of_newer_servers_do_no_harm() -> None:
    server = Server(ok(a_new_member=3, predictions=[PREDICTION | {"newer": 1}], risk={"epsilon": 0.1, "delta": 0.05}))
    with server.client() as client:
        answer = client.predict(ROW, model="m", request_id="mine")
    assert answer.predictions == (Prediction(label="6", confidence=0.9, depth=1, path="4", stopped_by="complete"),)
    assert answer.risk is not None
    assert (answer.model, answer.version, answer.risk.delta, answer.request_id, answer.requests) == (
        "m",
        1,
        0.05,
        "mine",
        1,
    )
    with pytest.raises(AttributeError):
        answer.model = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    "changes",
    [{"predictions": [PREDICTION, PREDICTION]}, {"predictions": None}, {"predictions": [{}]}, {"predictions": [3]}],
)
def test_an_answer_that_lacks_something_is_not_passed_on(changes: dict[str, object]) -> None:
    with Server(ok(**changes)).client() as client, pytest.raises(UnexpectedAnswer, match="expected"):
        client.predict(ROW, model="m")


def test_the_key_and_headers_go_with_everything_and_the_key_is_never_shown() -> None:
    server = Server(ok(), error(401))
    with server.client(api_key="sesame", headers={"X-Tenant": "a"}) as client:
        client.predict(ROW, request_id="id-1")
        with pytest.raises(HbllError) as caught:
            client.predict(ROW)
        assert "sesame" not in repr(vars(client)) + repr(caught.value) + str(caught.value)
    for request in server.asked:
        assert (request.headers["Authorization"], request.headers["X-Tenant"]) == ("Bearer sesame", "a")
    assert server.asked[0].headers["X-Request-Id"] == "id-1"
    assert caught.value.request_id == server.asked[1].headers["X-Request-Id"] != "id-1"


def test_what_is_served_and_its_shape_are_asked_once_and_again_after_they_proved_wrong() -> None:
    server = Server(ok(), ok(), error(404, "unknown_model"), ok())
    with server.client() as client:
        client.predict(ROW)
        client.predict([ROW])
        assert server.looked_up == ["/v1/models", "/v1/models/m"]
        with pytest.raises(NotServed):
            client.predict(ROW)
        client.predict(ROW)
    assert server.looked_up == ["/v1/models", "/v1/models/m"] * 2


@pytest.mark.parametrize(
    "failure", [error(429), error(503), error(502), httpx.ConnectError("refused"), httpx.ReadError("")]
)
def test_what_passes_is_tried_again_with_what_is_left_of_the_budget(failure: httpx.Response | Exception) -> None:
    server = Server(failure, failure, ok(deadline_met=True))
    with server.client() as client:
        answer = client.predict(ROW, latency_budget_ms=60_000)
    assert answer.requests == 3
    assert answer.deadline_met is True
    assert 60_000 > server.budgets[0] > server.budgets[1] > server.budgets[2] > 0
    assert server.asked[0].content == server.asked[2].content
    assert len({request.headers["X-Request-Id"] for request in server.asked}) == 1


def test_retries_end_with_the_last_failure() -> None:
    server = Server(*[error(503)] * 3)
    with server.client(retries=2) as client, pytest.raises(Unavailable, match="the server answered 503"):
        client.predict(ROW)
    assert len(server.asked) == 3


@pytest.mark.parametrize("options", [{"latency_budget_ms": 50_000}, {"timeout_s": 50.0}])
def test_a_server_that_wants_more_time_than_there_is_is_not_waited_for(options: dict[str, float]) -> None:
    server = Server(error(429, "queue_full", **{"Retry-After": "100"}))
    with server.client() as client, pytest.raises(Refused) as caught:
        client.predict(ROW, model="m", **options)  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.retry_after_s) == ("queue_full", 100.0)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (error(422), InvalidRequest),
        (error(500), ServerFailed),
        (error(504), DeadlineExceeded),
        (httpx.UnsupportedProtocol("ftp"), InvalidRequest),
    ],
)
def test_what_stays_wrong_is_asked_once(failure: httpx.Response | Exception, kind: type[HbllError]) -> None:
    server = Server(failure)
    with server.client() as client, pytest.raises(kind):
        client.predict(ROW)
    assert len(server.asked) == 1


def test_no_call_outlasts_its_deadline() -> None:
    """Also not with a body that never ends, which step by step timeouts let pass."""

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self):
            while True:
                await anyio.lowlevel.checkpoint()
                yield b" "

    async def endless() -> httpx.Response:
        return httpx.Response(200, stream=Endless())

    for answer in (anyio.sleep_forever, endless):
        server = Server(answer)  # type: ignore[arg-type]
        with server.client() as client, pytest.raises(DeadlineExceeded, match=r"within 0\.1 s"):
            client.predict(ROW, model="m", timeout_s=0.1)


def test_a_deadline_that_ends_the_retries_tells_what_went_wrong() -> None:
    server = Server(error(503), anyio.sleep_forever)  # type: ignore[arg-type]
    with server.client(timeout_s=1.0) as client, pytest.raises(DeadlineExceeded) as caught:
        client.predict(ROW)
    assert isinstance(caught.value.__cause__, Unavailable)


@pytest.mark.parametrize(
    ("budget_ms", "server_says", "elapsed_ms", "met"),
    [(50, True, 50, True), (50, True, 51, False), (50, False, 49, False), (None, True, 51, True), (None, None, 51, None)],
)
def test_a_deadline_is_met_if_the_answer_is_here_in_time(
    budget_ms: float | None, server_says: bool | None, elapsed_ms: float, met: bool | None
) -> None:
    content = ANSWER | {"deadline_met": server_says}
    answer = read_answer(content, (), rows=0, budget_ms=budget_ms, elapsed_ms=elapsed_ms, requests=1, request_id="")
    assert answer.deadline_met is met


def test_a_hedge_is_sent_when_the_first_is_slow_and_the_slower_one_is_given_up() -> None:
    given_up = []

    async def stuck() -> httpx.Response:
        try:
            await anyio.sleep_forever()
        finally:
            given_up.append(True)
        raise AssertionError

    server = Server(stuck, ok())
    with server.client(hedge_after_s=0.01) as client:
        answer = client.predict(ROW, latency_budget_ms=60_000)
    assert (answer.requests, given_up) == (2, [True])
    assert server.budgets[0] > server.budgets[1]
    assert server.asked[0].content == server.asked[1].content


def test_hedges_end_in_an_error_only_if_both_do_and_none_is_sent_after_an_answer() -> None:
    may_fail = []

    async def fails_later() -> httpx.Response:
        while not may_fail:
            await anyio.lowlevel.checkpoint()
        return error(500)

    async def answers_after_it() -> httpx.Response:
        may_fail.append(True)
        await anyio.sleep(0.01)
        return ok()

    async def fails_after_it() -> httpx.Response:
        await answers_after_it()
        return error(422)

    with Server(fails_later, answers_after_it).client(hedge_after_s=0.01) as client:
        assert client.predict(ROW).requests == 2
    may_fail.clear()
    with Server(fails_later, fails_after_it).client(hedge_after_s=0.01) as client, pytest.raises(InvalidRequest):
        client.predict(ROW)
    server = Server(ok(), error(422))
    with server.client(hedge_after_s=60) as client:
        client.predict(ROW)
        with pytest.raises(InvalidRequest):
            client.predict(ROW)
    assert len(server.asked) == 2


def test_what_goes_wrong_in_a_hedged_call_comes_as_in_any_other() -> None:
    """Bug found: it came in an ExceptionGroup."""
    for options in ({}, {"hedge_after_s": 60}):
        with Server(RuntimeError("closed")).client(**options) as client, pytest.raises(RuntimeError, match="closed"):
            client.predict(ROW)


RUNG = PREDICTION | {"stopped_by": None, "row": 0, "final": False, "total_ms": 0.3}
FINAL = PREDICTION | {"row": 0, "final": True, "total_ms": 0.4}
END = {"model": "m", "version": 1, "deadline_met": None, "risk": None, **TIMES}


def test_a_stream_is_rungs_and_then_the_answer() -> None:
    server = Server(error(503), sse(("answer", RUNG), ("something_new", {}), ("answer", FINAL), ("end", END)))
    with server.client() as client:
        *rungs, answer = client.stream(ROW, monotone=True)
    assert [isinstance(rung, Rung) and rung.final for rung in rungs] == [False, True]
    assert isinstance(answer, Answer)
    assert [row.stopped_by for row in answer.predictions] == ["complete"]
    assert answer.requests == 2
    assert json.loads(server.asked[1].content)["monotone"] is True


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        ([], Unavailable),
        ([("error", {"error": "late", "code": "deadline_expired"})], DeadlineExceeded),
        ([("error", {"error": "a bug", "code": "inference_failed"})], ServerFailed),
        ([("end", END)], UnexpectedAnswer),
    ],
    ids=["breaks off", "late", "fails", "ends without a final answer"],
)
def test_a_stream_that_ends_badly_says_so_after_what_it_had(last: list, kind: type[HbllError]) -> None:
    with Server(sse(("answer", RUNG), *last)).client() as client:
        stream = client.stream(ROW, request_id="mine")
        assert isinstance(next(stream), Rung)
        with pytest.raises(kind) as caught:
            next(stream)
    assert caught.value.request_id == "mine"


def test_readiness_is_told_not_raised() -> None:
    def not_ready(_: httpx.Request) -> httpx.Response:
        return httpx.Response(503, json={"ready": False, "drift_alarms": {"m": [0.1]}})

    with Client("http://test", transport=httpx.MockTransport(not_ready)) as client:
        assert client.ready() == Readiness(ready=False, drift_alarms={"m": (0.1,)})


@pytest.mark.parametrize("answer", [httpx.Response(503, text="<html>"), error(503, "too_many_connections")])
def test_a_503_that_is_not_about_readiness_is_raised(answer: httpx.Response) -> None:
    """Bug found: a proxy's page was told as "the server answered 200"."""
    transport = httpx.MockTransport(lambda _: answer)
    with Client("http://test", transport=transport) as client, pytest.raises(Unavailable, match="server answered 503"):
        client.ready()


def test_a_server_without_models_is_said_to_have_none() -> None:
    def nothing(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"models": []})

    transport = httpx.MockTransport(nothing)
    with Client("http://test", transport=transport) as client, pytest.raises(NotServed, match="no model is served"):
        client.plan()


def test_every_call_asks_anew_which_model_there_is_after_it_was_gone() -> None:
    """Bug found: plans, and predictions that first asked for the shape, went on asking for the model that was gone."""
    served = ["old"]

    def answer(request: httpx.Request) -> httpx.Response:
        asked = request.url.path.split("/")
        if len(asked) == 3:
            return httpx.Response(200, json={"models": [MODEL | {"name": served[-1]}]})
        plan = {
            "model": "",
            "policy": "",
            "path": "4",
            "depth": 1,
            "expected_ms": 1,
            "feasible": True,
            "reason": "",
            "answers": [],
        }
        found = {"plan": plan, "predict": ANSWER}.get(asked[-1], {})
        return httpx.Response(200, json=MODEL | found) if asked[3] == served[-1] else error(404, "unknown_model")

    for call in (lambda client: client.plan(), lambda client: client.predict(ROW)):
        with Client("http://test", transport=httpx.MockTransport(answer)) as client:
            client.plan()
            served.append("new")
            with pytest.raises(NotServed):
                call(client)
            call(client)
            served.append("newer")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_a_file_that_cannot_be_read_to_its_end_does_not_outlast_the_deadline(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    try:
        with Server().client() as client, pytest.raises(DeadlineExceeded):
            client.predict(pipe, model="m", timeout_s=0.1)
    finally:
        os.close(os.open(pipe, os.O_RDWR))  # lets the thread end that waits for a writer


def test_an_unknown_option_is_a_type_error() -> None:
    with Server().client() as client, pytest.raises(TypeError, match="unknown option budget_ms: expected some of depth"):
        client.predict(ROW, budget_ms=5)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "http://host:port"}, "base_url: Invalid port"),
        ({"api_key": "schlüssel"}, "api_key and headers: expected"),
    ],
)
def test_what_http_cannot_carry_is_told_when_the_client_is_made(options: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        AsyncClient(**options)  # type: ignore[arg-type]


def test_a_closed_client_and_one_from_before_a_fork_do_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Server(ok()).client()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(RuntimeError, match="make one in each process"):
            client.models()
    stream = client.stream(ROW)
    client.close()
    client.close()
    for call in (client.models, lambda: next(stream)):
        with pytest.raises(RuntimeError, match="this client is closed"):
            call()


def test_a_client_from_before_a_fork_can_be_closed_in_both_processes() -> None:
    """Bug found: leaving `with` in the child waited for ever for a thread that is not there."""
    program = """
import os
from hbll.client import Client
with Client("http://127.0.0.1:9"):
    child = os.fork()
if child:
    raise SystemExit(os.waitpid(child, 0)[1])
"""
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", program], timeout=60, check=False)
    assert ended.returncode == 0


def test_a_stream_from_before_a_fork_is_left_to_the_process_that_began_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug found: ending it in the child raised, and Python wrote of an exception that it ignored."""
    with Server(sse(("answer", RUNG))).client() as client:
        stream = client.stream(ROW)
        next(stream)
        with monkeypatch.context() as forked:
            forked.setattr(os, "getpid", lambda: -1)
            stream.close()


def test_a_stream_that_outlives_its_client_can_still_be_closed() -> None:
    with Server(sse(("answer", RUNG))).client() as client:
        stream = client.stream(ROW)
        next(stream)
    stream.close()


_WAITS_S = 0.1
"""After which the main thread waits. Python sees a signal that comes just before that only at the end of the wait."""


def test_an_interrupt_ends_the_call_and_its_request() -> None:
    given_up = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    async def interrupts() -> httpx.Response:
        try:
            await anyio.sleep(_WAITS_S)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            await anyio.sleep_forever()
        finally:
            given_up.append(True)
        raise AssertionError

    try:
        with Server(interrupts).client(timeout_s=60) as client, pytest.raises(KeyboardInterrupt):
            client.predict(ROW)
    finally:
        signal.signal(signal.SIGINT, before)
    assert given_up == [True]


def test_an_interrupt_ends_a_stream_and_its_request() -> None:
    """Bug found: what was raised was not the interrupt, but that the stream could not be closed while it was read."""
    given_up = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    class Interrupted(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield sse(("answer", RUNG)).content
            await anyio.sleep(_WAITS_S)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            await anyio.sleep_forever()

        async def aclose(self) -> None:
            for _ in range(100):  # as a connection takes its time to close
                await anyio.lowlevel.checkpoint()
            given_up.append(True)

    server = Server(httpx.Response(200, stream=Interrupted()))
    try:
        with server.client(timeout_s=60) as client, pytest.raises(KeyboardInterrupt):
            list(client.stream(ROW))
    finally:
        signal.signal(signal.SIGINT, before)
    assert given_up == [True]


def test_the_asynchronous_client_does_the_same() -> None:
    server = Server(error(503), ok(), sse(("answer", FINAL), ("end", END)))

    async def ask() -> tuple[Answer, list[Rung | Answer]]:
        async with AsyncClient("http://test", transport=httpx.MockTransport(server)) as client:
            return await client.predict(ROW), [event async for event in client.stream(ROW)]

    answer, events = asyncio.run(ask())
    assert answer.requests == 2
    assert [type(event) for event in events] == [Rung, Answer]


def test_an_answer_counts_though_the_other_of_two_requests_fails_in_the_same_moment() -> None:
    both = []

    async def together(outcome: httpx.Response) -> httpx.Response:
        both.append(outcome)
        while len(both) < 2:
            await anyio.lowlevel.checkpoint()
        return outcome

    async def answers() -> httpx.Response:
        return await together(ok())

    async def fails() -> httpx.Response:
        return await together(error(422))

    for steps in ((answers, fails), (fails, answers)):
        both.clear()
        with Server(*steps).client(hedge_after_s=0.01) as client:
            assert client.predict(ROW).requests == 2


def test_a_client_that_is_not_closed_keeps_no_program_from_its_end() -> None:
    """Bug found: a program that failed before it closed its client said why, and hung."""
    program = "from hbll.client import Client; client = Client('http://127.0.0.1:9'); raise SystemExit('why')"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr.strip()) == (1, "why")


@pytest.mark.parametrize("url", ["test", "test:80", "http://test"])
def test_a_url_may_do_without_its_scheme(url: str) -> None:
    server = Server(ok())
    with Client(url, transport=httpx.MockTransport(server)) as client:
        client.predict(ROW)
    assert server.asked[0].url.scheme == "http"
    assert server.asked[0].url.host == "test"
