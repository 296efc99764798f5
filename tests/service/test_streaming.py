"""What of a stream cannot be seen from outside: readers that stall, errors on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from pydantic import BaseModel

from service.answers import Answer, OnAnswer, RowAnswer
from service.errors import InferenceFailed, ServiceError
from service.streaming import EventStream, answer_events


class Shown(BaseModel):
    value: int


class Call:
    """An engine call that tells one answer and then ends as it is told."""

    def __init__(self, error: Exception | None = None, forever: bool = False) -> None:
        self.error, self.forever = error, forever
        self.cancelled = False

    async def __call__(self, on_answer: OnAnswer) -> Answer:
        on_answer(0, None)  # type: ignore[arg-type]
        try:
            await asyncio.sleep(3600 if self.forever else 0)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if self.error:
            raise self.error
        return Answer((), 0.0, 0.0, 0.0, 0.0)


def events(call: Call, counted: list[str]) -> AsyncGenerator[bytes]:
    def on_answer(_row: int, _answer: RowAnswer) -> BaseModel:
        return Shown(value=1)

    def on_end(_answer: Answer) -> BaseModel:
        return Shown(value=2)

    def on_error(error: ServiceError) -> None:
        counted.append(error.code)

    return answer_events(call, on_answer, on_end, on_error)


async def collect(call: Call, counted: list[str]) -> list[bytes]:
    return [event async for event in events(call, counted)]


def test_a_stream_ends_with_an_end() -> None:
    assert asyncio.run(collect(Call(), [])) == [
        b'event: answer\ndata: {"value":1}\n\n',
        b'event: end\ndata: {"value":2}\n\n',
    ]


@pytest.mark.parametrize(
    ("error", "code"), [(InferenceFailed("the model broke"), "inference_failed"), (ZeroDivisionError("secret"), "internal")]
)
def test_any_error_on_the_way_is_an_event_and_counted(error: Exception, code: str) -> None:
    counted: list[str] = []
    _, last = asyncio.run(collect(Call(error), counted))
    assert last.startswith(b"event: error\n")
    assert f'"code":"{code}"'.encode() in last
    assert b"secret" not in last
    assert counted == [code]


def test_a_reader_that_stalls_and_leaves_does_not_leave_its_work_running() -> None:
    """Cancelled within `send`, the body iterator once stayed suspended and the engine call went on."""

    async def test() -> None:
        call, gone = Call(forever=True), []
        stream = events(call, [])
        response = EventStream(await anext(stream), stream, on_gone=lambda: gone.append(1))
        left = asyncio.Event()

        async def receive() -> dict[str, str]:
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(_: object) -> None:
            left.set()
            await asyncio.sleep(3600)

        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        await asyncio.wait_for(response(scope, receive, send), timeout=20)
        await asyncio.sleep(0)
        assert call.cancelled
        assert gone == [1]

    asyncio.run(test())
