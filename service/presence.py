"""Work that ends when its client goes: nobody pays for an answer that nobody reads."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request

from service.errors import ClientGone

T = TypeVar("T")

_UNWATCHED_S = 0.002
"""For so long nobody watches whether a client goes: quick answers are there by then, and need no task beside them."""


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client of `request`, whose body was read, disconnects first.

    Raises:
        ClientGone: it did.
    """
    waiting = asyncio.current_task()
    assert waiting is not None
    gone = False
    watcher: asyncio.Task[None] | None = None

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        waiting.cancel()

    def begin() -> None:
        nonlocal watcher
        watcher = asyncio.create_task(watch())  # the only task: the work is awaited here

    timer = asyncio.get_running_loop().call_later(_UNWATCHED_S, begin)
    try:
        return await work
    except asyncio.CancelledError:
        if not gone or waiting.uncancel():  # cancelled by somebody else, too
            raise
        raise ClientGone("the client closed the connection before its answer was there") from None
    finally:
        timer.cancel()
        if watcher is not None:
            watcher.cancel()
