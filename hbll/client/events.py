"""Server-sent events, read line by line: as much of the format as the server writes."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterable
from typing import Any

from hbll.client.errors import UnexpectedAnswer


class EventReader:
    """Puts lines together to events."""

    def __init__(self) -> None:
        self._name = ""
        self._data: list[str] = []

    def feed(self, line: str) -> tuple[str, Any] | None:
        """The event, (name, its JSON data), that ends with this line; none if none does.

        Raises:
            UnexpectedAnswer: its data are no JSON.
        """
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            self._name = value
        elif field == "data":
            self._data.append(value)
        if line or not self._data:
            return None
        name, text = self._name, "\n".join(self._data)
        self._name, self._data = "", []
        try:
            return name, json.loads(text)
        except ValueError as exc:
            raise UnexpectedAnswer(f"expected an event with JSON, got {text[:80]!r}") from exc


async def read_events(pieces: AsyncIterable[str]) -> AsyncGenerator[tuple[str, Any]]:
    """The events of a whole body, which comes in pieces. Lines end by line feeds alone: httpx's end at whatever Unicode
    calls the end of a line, and labels may have that."""
    reader, rest = EventReader(), ""
    async for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            event = reader.feed(line.removesuffix("\r"))
            if event is not None:
                yield event
