"""Answers as server-sent events, one per rung as soon as it is known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine

from fastapi.sse import format_sse_event
from pydantic import BaseModel

from service.engine import Answer, OnAnswer, RowAnswer
from service.errors import ServiceError

Work = Callable[[OnAnswer], Coroutine[None, None, Answer]]


async def answer_events(
    work: Work,
    on_answer: Callable[[int, RowAnswer], BaseModel],
    on_end: Callable[[Answer], BaseModel],
) -> AsyncGenerator[bytes]:
    """Events `answer`, then `end`, of one engine call; an error after the first of them is an event `error`.

    The first event is awaited by whoever asks for it, so that an error before any answer can still become a status.
    Closing the iterator, as a client that leaves does, cancels the call.

    Raises:
        ServiceError: before the first event.
    """
    answers: asyncio.Queue[tuple[int, RowAnswer] | None] = asyncio.Queue()  # at most rows x rungs
    call = asyncio.ensure_future(work(lambda row, answer: answers.put_nowait((row, answer))))
    call.add_done_callback(lambda _: answers.put_nowait(None))
    started = False
    try:
        while (found := await answers.get()) is not None:
            yield _event("answer", on_answer(*found))
            started = True
        yield _event("end", on_end(call.result()))
    except ServiceError as error:
        if not started:
            raise
        yield _event("error", _Failure(error=str(error), code=error.code))
    finally:
        call.cancel()


class MostConfident:
    """Keeps, for each row, its most confident answer so far."""

    def __init__(self) -> None:
        self._best: dict[int, RowAnswer] = {}

    def __call__(self, row: int, answer: RowAnswer) -> RowAnswer:
        """The best of the row's answers up to and with `answer`; a tie goes to the deeper one."""
        best = self._best.get(row)
        if best is None or answer.confidence >= best.confidence:
            best = self._best[row] = answer
        return best


class _Failure(BaseModel):
    error: str
    code: str


def _event(name: str, content: BaseModel) -> bytes:
    return format_sse_event(event=name, data_str=content.model_dump_json())
