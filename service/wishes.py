"""Wishes as HTTP headers, for clients that can send headers and nothing else, and for proxies that set a default; and in
the query, for bodies that are all tensor.

Every protocol's route hands what its body wishes for to `with_headers`, so that they all mean the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import parse_qs, parse_qsl

from pydantic import ValidationError

from service.errors import InvalidInput
from service.responses import describe
from service.schemas import ABOUT_DEPTH, Wishes

W = TypeVar("W", bound=Wishes)

_NUMBER = re.compile(r"[+-]?[0-9]{1,20}(\.[0-9]{0,20})?([eE][+-]?[0-9]{1,3})?")
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def _depth(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else text


def _number(text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise ValueError("a number")
    return float(text)


def _boolean(text: str) -> bool:
    try:
        return _BOOLEANS[text.lower()]
    except KeyError:
        raise ValueError("true or false") from None


_HEADERS: dict[bytes, tuple[str, Callable[[str], Any]]] = {
    b"x-depth": ("depth", _depth),
    b"x-path": ("path", str),
    b"x-latency-budget-ms": ("latency_budget_ms", _number),
    b"x-min-confidence": ("min_confidence", _number),
    b"x-max-risk": ("max_risk", _number),
    b"x-strict": ("strict", _boolean),
}

_QUERY: dict[str, Callable[[str], Any]] = dict(_HEADERS.values()) | {"probabilities": _boolean}

_LONGEST_KEPT = 200  # bytes of a query: longer than anybody needs

_TYPES: dict[Callable[[str], Any], str] = {_number: "number", _boolean: "boolean"}

HEADER_PARAMETERS: list[dict[str, Any]] = [
    {
        "name": header.decode().title(),
        "in": "header",
        "required": False,
        "schema": {"type": _TYPES.get(read, "string")},
        "description": f"`{name}`, where the body has none",
    }
    for header, (name, read) in _HEADERS.items()
]
"""The headers as parameters of an OpenAPI operation."""


QUERY_PARAMETERS: list[dict[str, Any]] = [
    {
        "name": name,
        "in": "query",
        "required": False,
        "schema": {"type": _TYPES.get(read, "string")},
        "description": "only with a raw body",
    }
    for name, read in _QUERY.items()
]
"""The query of a raw body as parameters of an OpenAPI operation."""


class QueryWishes(Wishes, frozen=True):
    """What the query of a raw body can say."""

    probabilities: bool = False


def with_query(query: bytes) -> QueryWishes:
    """The wishes in a raw query string. Clients ask the same again and again, so what was read is kept.

    Raises:
        InvalidInput: one is unknown, cannot be read, comes twice, or is out of range; they exclude each other.
    """
    return _read_query(query) if len(query) <= _LONGEST_KEPT else _read_query.__wrapped__(query)


@lru_cache(maxsize=1024)
def _read_query(query: bytes) -> QueryWishes:
    found: dict[str, Any] = {}
    for name, text in parse_qsl(query.decode("latin-1"), keep_blank_values=True) if query else ():
        if name not in _QUERY:
            raise InvalidInput(f"query: expected some of {', '.join(_QUERY)}, got {name[:40]!r}")
        if name in found:
            raise InvalidInput(f"query {name}: expected one, got several")
        try:
            found[name] = _QUERY[name](text)
        except ValueError as exc:
            raise InvalidInput(f"query {name}: expected {exc}, got {text[:40]!r}") from exc
    try:
        return QueryWishes.model_validate(found)
    except ValidationError as exc:
        raise InvalidInput(describe(exc.errors()[0])) from exc


def refuse_query(query: bytes) -> None:
    """Of a request whose body says what is wished: nothing that is wished is passed over.

    Raises:
        InvalidInput: there is a wish in it.
    """
    for name in parse_qs(query.decode("latin-1"), keep_blank_values=True) if query else ():
        if name in _QUERY:
            instead = f"put {name} into the JSON, or a header"
            raise InvalidInput(f"query {name}: only raw bodies take wishes in the query; {instead}")


def with_headers(wishes: W, headers: Iterable[tuple[bytes, bytes]]) -> W:
    """`wishes`, filled up with those in the raw ASGI `headers`.

    The body wins: a header counts only where the body is silent, and none about depth where the body has any.

    Raises:
        InvalidInput: a header cannot be read, comes twice, or is out of range; headers exclude each other.
    """
    found: dict[str, Any] = {}
    for header, value in headers:
        if header in _HEADERS:
            name, read = _HEADERS[header]
            if name in found:
                raise InvalidInput(f"header {header.decode().title()}: expected one, got several")
            try:
                found[name] = read(value.decode("latin-1").strip())
            except ValueError as exc:
                shown = value[:40].decode("latin-1")
                raise InvalidInput(f"header {header.decode().title()}: expected {exc}, got {shown!r}") from exc
    if not found:
        return wishes
    given = {name: value for name in wishes.model_fields_set if (value := getattr(wishes, name)) is not None}
    if wishes.wishes:
        found = {name: value for name, value in found.items() if name not in ABOUT_DEPTH}
    try:
        return type(wishes).model_validate({**found, **given})
    except ValidationError as exc:
        raise InvalidInput(describe(exc.errors()[0])) from exc
