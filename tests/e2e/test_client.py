"""The client and real servers: one that serves digits, and one whose runner the tests can hold back."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import httpx
import numpy as np
import pytest
from PIL import Image

from hbll.client import Answer, AsyncClient, Client, DeadlineExceeded, InvalidRequest, NotServed, Rung, Unavailable
from tests.conftest import LiveServer, wait_for
from tests.e2e.held import HeldServer
from training.dataset import Dataset

FAKE = np.float32([[0.1, 0], [0, 0]])
"""A row of the held server's model, which all of its climb leaves unsure."""


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[Client]:
    with Client(server.url, timeout_s=60) as client:
        yield client


@pytest.fixture(scope="module")
def images(digits: Dataset) -> np.ndarray:
    return digits.test.x[:6].numpy()


def whole(answer: Answer) -> list[tuple[str, str, float]]:
    return [(row.label, row.path, round(row.confidence, 4)) for row in answer.predictions]


def test_arrays_are_answered_as_their_json_is(server: LiveServer, client: Client, images: np.ndarray) -> None:
    body = {"inputs": images.tolist(), "depth": 2, "probabilities": True}
    expected = httpx.post(f"{server.url}/v1/models/digits/predict", json=body, timeout=60).json()["predictions"]
    for inputs in (images, list(images), images.astype(np.float64)):
        answer = client.predict(inputs, model="digits", depth=2, probabilities=True)
        assert [(row.label, row.path, row.stopped_by) for row in answer.predictions] == [
            (row["label"], row["path"], "depth") for row in expected
        ]
        for row, other in zip(answer.predictions, expected, strict=True):
            assert row.probabilities == pytest.approx(other["probabilities"], abs=1e-5)
    assert whole(client.predict(images[0], depth=2)) == whole(answer)[:1]


def test_pictures_in_every_form_and_mixed_with_arrays(client: Client, images: np.ndarray, tmp_path: Path) -> None:
    picture = Image.fromarray((images[0] * 255).round().astype("uint8"))
    file = tmp_path / "digit.png"
    picture.save(file)
    content = io.BytesIO()
    picture.save(content, "BMP")
    answer = client.predict([picture, file, str(file), content.getvalue(), np.asarray(picture, np.float32) / 255], depth=3)
    assert len(set(whole(answer))) == 1
    assert whole(client.predict(file, depth=3)) == whole(client.predict(picture, depth=3)) == whole(answer)[:1]


def test_every_wish_is_heard(client: Client, images: np.ndarray) -> None:
    def stops(**wishes: object) -> set[object]:
        return {row.stopped_by for row in client.predict(images, **wishes).predictions}  # type: ignore[arg-type]

    detail = client.model("digits")
    assert stops() == {"complete"}
    assert stops(depth="full", version=1) == {"depth"}
    assert stops(path="4-6-7") == {"path"}
    assert stops(min_confidence=0) == {"confidence"}
    certified = client.predict(images, max_risk=max(detail.risk_levels)) if detail.risk_levels else None
    assert certified is None or all(row.certified for row in certified.predictions)
    answer = client.predict(images, latency_budget_ms=60_000, depth=1)
    assert answer.deadline_met is True
    assert answer.elapsed_ms >= answer.total_ms > 0
    assert client.model("digits", version=1).version == client.plan(version=1).version == 1
    plan = client.plan(latency_budget_ms=60_000, depth=3)
    assert (plan.model, plan.depth, plan.feasible, plan.answers[-1].path) == ("digits", 3, True, plan.path)
    assert [model.name for model in client.models()] == ["digits"]
    assert client.ready().ready
    assert detail.input_shape == (28, 28)
    assert detail.climb[-1] == detail.reference


def test_errors_say_what_the_server_says(client: Client, images: np.ndarray) -> None:
    with pytest.raises(InvalidRequest, match="depth 9 is not offered") as invalid:
        client.predict(images, depth=9)
    assert (invalid.value.status, invalid.value.code) == (422, "not_offered")
    assert invalid.value.details["offered"]
    with pytest.raises(NotServed, match="no model 'cats' is served here"):
        client.predict(images, model="cats")
    with pytest.raises(NotServed, match="version '7' of digits is not served here"):
        client.predict(images, version=7)
    with pytest.raises(InvalidRequest, match=r"expected shape \(28, 28\) or \(rows, 28, 28\), got \(28, 6, 28\)"):
        client.predict(images.transpose(1, 0, 2))
    with pytest.raises(InvalidRequest, match="pixels between 0"):
        client.predict(images * 255)


def test_a_strict_budget_that_cannot_be_met_is_told_with_one_that_could(held: HeldServer) -> None:
    """The runner takes 0.2 s a block, and the server learns that from the first answers."""
    held.runner.before = lambda _: time.sleep(0.2)
    refused: DeadlineExceeded | None = None
    with Client(held.url) as client:
        for _ in range(20):
            try:
                client.predict(FAKE, model="fake", latency_budget_ms=150, strict=True, path="4")
            except DeadlineExceeded as error:
                refused = error
                if error.code == "deadline_infeasible":
                    break
    assert refused is not None
    assert (refused.status, refused.code) == (504, "deadline_infeasible")
    assert refused.smallest_feasible_budget_ms is not None
    assert refused.smallest_feasible_budget_ms > 150


def test_streams_are_rungs_and_then_what_predict_answers(client: Client, images: np.ndarray) -> None:
    *rungs, answer = client.stream(images)
    climb = client.model("digits").climb
    assert all(isinstance(rung, Rung) for rung in rungs)
    for row in range(len(images)):
        mine = [rung for rung in rungs if isinstance(rung, Rung) and rung.row == row]
        assert tuple(rung.prediction.path for rung in mine) == climb
        assert [rung.final for rung in mine] == [False] * (len(climb) - 1) + [True]
    assert isinstance(answer, Answer)
    assert whole(answer) == whole(client.predict(images))


@pytest.mark.parametrize("way", ["leave the loop", "close", "async close"])
def test_leaving_a_stream_stops_the_blocks(held: HeldServer, way: str) -> None:
    """The first rung is answered; the reader leaves while the second runs; the third never does."""
    second, left = threading.Event(), threading.Event()

    def before(nodes: tuple[int, ...]) -> None:
        if nodes == (6,):
            second.set()
            assert left.wait(20)

    held.runner.before = before

    async def leave() -> None:
        async with AsyncClient(held.url) as client, contextlib.aclosing(client.stream(FAKE)) as events:
            assert isinstance(await anext(events), Rung)
            assert await asyncio.to_thread(second.wait, 20)

    with Client(held.url) as client:
        if way == "async close":
            asyncio.run(leave())
        elif way == "close":
            with contextlib.closing(client.stream(FAKE)) as events:
                assert isinstance(next(events), Rung)
                assert second.wait(20)
        else:
            for event in client.stream(FAKE):
                assert isinstance(event, Rung)
                assert second.wait(20)
                break
        wait_for(lambda: held.metric('hbll_refusals_total{code="client_gone"}') == 1)
        left.set()
        client.predict(FAKE, path="4")
    assert [nodes for nodes, _, _ in held.runner.runs] == [(4,), (6,), (4,)]


def test_a_full_queue_is_waited_for_as_long_as_the_server_says(held: HeldServer) -> None:
    """The queue holds 1,024 rows: four requests of 256 fill it behind the first batch."""
    held.runner.go.clear()
    held.runner.began.clear()
    with Client(held.url, timeout_s=60) as client, ThreadPoolExecutor(6) as pool:
        client.model("fake")
        busy = [pool.submit(client.predict, np.stack([FAKE] * 32))]
        assert held.runner.began.wait(20)
        busy += [pool.submit(client.predict, np.stack([FAKE] * 256)) for _ in range(4)]
        wait_for(lambda: held.metric("hbll_queue_rows") == 1024)
        late = pool.submit(client.predict, FAKE, latency_budget_ms=60_000)
        wait_for(lambda: held.metric('hbll_refusals_total{code="queue_full"}') >= 1)
        held.runner.go.set()
        assert late.result().requests >= 2
        assert late.result().elapsed_ms >= 1000  # Retry-After
        assert late.result().deadline_met is True
        assert [len(answer.result().predictions) for answer in busy] == [32, 256, 256, 256, 256]


class LosesTheFirst(httpx.AsyncHTTPTransport):
    """A network in which the first prediction stays on its way for ever."""

    lost = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "POST" and not self.lost:
            self.lost += 1
            await anyio.sleep_forever()
        return await super().handle_async_request(request)


def test_hedging_answers_though_the_first_request_got_lost(held: HeldServer) -> None:
    async def ask() -> Answer:
        async with AsyncClient(held.url, hedge_after_s=0.05, transport=LosesTheFirst()) as client:
            return await client.predict(FAKE)

    with Client(held.url, hedge_after_s=0.05, transport=LosesTheFirst()) as client:
        for answer in (client.predict(FAKE), asyncio.run(ask())):
            assert (answer.requests, answer.predictions[0].label) == (2, "yes")


def test_one_client_serves_many_threads_and_tasks(client: Client, server: LiveServer, images: np.ndarray) -> None:
    alone = [whole(client.predict(image, depth=2)) for image in images]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda number: whole(client.predict(images[number % 6], depth=2)), range(64)))
    assert together == [alone[number % 6] for number in range(64)]

    async def ask() -> list[Answer]:
        async with AsyncClient(server.url, timeout_s=60) as other:
            return await asyncio.gather(*(other.predict(images[number % 6], depth=2) for number in range(64)))

    assert [whole(answer) for answer in asyncio.run(ask())] == [alone[number % 6] for number in range(64)]


def test_without_a_server_the_next_step_is_named() -> None:
    with socket.socket() as nobody:  # bound and not listening
        nobody.bind(("127.0.0.1", 0))
        with Client(f"http://127.0.0.1:{nobody.getsockname()[1]}", retries=1) as client:
            for call in (client.models, client.ready, lambda: client.predict(FAKE), lambda: next(client.stream(FAKE))):
                with pytest.raises(Unavailable, match="Start one with `hbll serve`"):
                    call()


def test_a_server_that_falls_silent_is_given_up_in_time(trickle: str) -> None:
    """It sends a byte now and then for ever, which a timeout of each step would wait for."""
    with Client(trickle, timeout_s=0.5) as client, pytest.raises(DeadlineExceeded, match=r"within 0\.5 s"):
        client.models()


@pytest.fixture
def trickle() -> Iterator[str]:
    stop = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(ConnectionError):
            connection.recv(4000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while not stop.wait(0.02):
                connection.sendall(b" ")

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    stop.set()
    thread.join()
    listener.close()
