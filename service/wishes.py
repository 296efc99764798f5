"""Wishes as HTTP headers, for clients that can send headers and nothing else, and for proxies that set a default; and in
the query, for bodies that are all tensor.

Every protocol's route hands what its body wishes for to `with_headers`, so that they all mean the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from pydantic import ValidationError

from service.errors import InvalidInput
from service.media import OCTETS, is_read
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

_BUDGET, _TIMEOUT = b'"latency_budget_ms"', b'"timeout"'
_HEADER_LENGTH = b"inference-header-content-length"
_V1, _V2 = re.compile(r"/v1/.*/predict(/stream)?"), re.compile(r"/v2/.*/infer")
_JSON_NUMBER = re.compile(rb"\s*:\s*([0-9.eE+-]{1,30})\s*[,}]")
_LONGEST_SOUGHT = 1 << 18  # bytes of a body

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


def glimpsed_budget_ms(
    path: str, query: bytes, headers: Iterable[tuple[bytes, bytes]], body: bytes | bytearray
) -> float | None:
    """The latency budget of a request for answers as far as it shows before its `body` is decoded; none if it does not. It
    decides who is refused unread, so what looks unusual shows none."""
    headers = list(headers)
    known = dict(headers)
    is_v2 = _V2.fullmatch(path) is not None
    if not (is_v2 or _V1.fullmatch(path)) or b"content-encoding" in known:
        return None
    try:
        if not is_v2 and is_read(known.get(b"content-type", b"").decode("latin-1"), (OCTETS,), unnamed=False):
            return with_headers(with_query(query), headers).latency_budget_ms
        if is_v2 and _HEADER_LENGTH in known:  # of the JSON before the tensors
            body = body[: int(known[_HEADER_LENGTH])]
        if len(body) > _LONGEST_SOUGHT or b"\\u" in body:
            return None
        budget_ms = _shown(body, _BUDGET)
        if budget_ms is None:
            budget_ms = with_headers(Wishes(), headers).latency_budget_ms
        if is_v2 and (timeout_us := _shown(body, _TIMEOUT)):
            budget_ms = min(budget_ms or math.inf, timeout_us / 1000)
    except (InvalidInput, ValueError):  # whoever reads it whole will say so
        return None
    return budget_ms or None


def _shown(text: bytes | bytearray, name: bytes) -> float | None:
    """The number that JSON has under a quoted name; none if that is not in it.

    Raises:
        ValueError: it is there more than once, or is no number from zero on.
    """
    if (place := text.find(name)) < 0:
        return None
    value = _JSON_NUMBER.match(text, place + len(name))
    if value is None or text.count(name) > 1 or (number := float(value[1])) < 0:
        raise ValueError(f"expected one number for {name.decode()}")
    return number


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
