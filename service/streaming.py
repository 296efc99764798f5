"""Answers as server-sent events, one per rung as soon as it is known."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine

from fastapi.sse import format_sse_event
from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.answers import Answer, OnAnswer, RowAnswer
from service.errors import ServiceError
from service.schemas import Error

logger = logging.getLogger(__name__)

Work = Callable[[OnAnswer], Coroutine[None, None, Answer]]


async def answer_events(
    work: Work,
    on_answer: Callable[[int, RowAnswer], BaseModel],
    on_end: Callable[[Answer], BaseModel],
    on_error: Callable[[ServiceError], None],
) -> AsyncGenerator[bytes]:
    """Events `answer`, then `end`, of one engine call; an error after the first of them is an event `error`.

    The first event is awaited by whoever asks for it, so that an error before any answer can still become a status.
    Closing the generator cancels the call.

    Raises:
        ServiceError: before the first event.
    """
    answers: asyncio.Queue[tuple[int, RowAnswer] | None] = asyncio.Queue()  # at most rows x rungs
    call = asyncio.ensure_future(work(lambda row, answer: answers.put_nowait((row, answer))))

    def ended(task: asyncio.Future[Answer]) -> None:
        if not task.cancelled():
            task.exception()  # retrieved, even if the reader has gone
        answers.put_nowait(None)

    call.add_done_callback(ended)
    started = False
    try:
        while (found := await answers.get()) is not None:
            yield _event("answer", on_answer(*found))
            started = True
        yield _event("end", on_end(call.result()))
    except Exception as exc:
        if not started:
            raise
        if not isinstance(exc, ServiceError):
            logger.exception("a stream met an error of its own")
        error = exc if isinstance(exc, ServiceError) else ServiceError("the server met an error of its own")
        on_error(error)
        yield _event("error", Error(error=str(error), code=error.code, **error.details))
    finally:
        call.cancel()


class EventStream(StreamingResponse):
    """Sends the `first` event and the rest of `events`, and closes them however sending ends: cancelled within a
    `send` that waits for a slow reader, a body iterator would otherwise be left suspended, its engine call running."""

    def __init__(self, first: bytes, events: AsyncGenerator[bytes], on_gone: Callable[[], None]) -> None:
        self._events = events
        self._on_gone = on_gone
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(self._all(first), media_type="text/event-stream", headers=headers)
        self._finished = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            if not self._finished:
                self._on_gone()

    async def _all(self, first: bytes) -> AsyncIterator[bytes]:
        yield first
        async for event in self._events:
            yield event
        self._finished = True


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


def _event(name: str, content: BaseModel) -> bytes:
    return format_sse_event(event=name, data_str=content.model_dump_json())
