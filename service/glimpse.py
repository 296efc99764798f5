"""The latency budget of a request for answers, as far as it shows before the request is read: it decides who is refused
unread (`service.gate`), so what looks unusual shows none, and what shows is what reading would find.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pydantic_core import from_json

from service.errors import ServiceError
from service.media import OCTETS, is_read
from service.oip.wire import HEADER_LENGTH, read_parameters
from service.schemas import Wishes
from service.wishes import with_headers, with_query

_V1, _V2 = re.compile(r"/v1/.*/predict(/stream)?"), re.compile(r"/v2/.*/infer")

_BUDGET = b'"latency_budget_ms"'
_NUMBER = re.compile(rb"\s*:\s*([0-9.eE+-]{1,30})\s*[,}]")
_LONGEST_SOUGHT = 1 << 18  # bytes of a body
_LONGEST_PARSED = 1 << 11  # of JSON: enough before binary tensors, as clients send them who are in a hurry
_HEADER_LENGTH = HEADER_LENGTH.lower().encode()

Headers = list[tuple[bytes, bytes]]


def glimpsed_budget_ms(
    path: str, query: bytes, headers: Iterable[tuple[bytes, bytes]], body: bytes | bytearray
) -> float | None:
    """The budget of a request to `/v1` or `/v2`, milliseconds; none if it does not show, or there is none."""
    headers = list(headers)
    if any(name == b"content-encoding" for name, _ in headers):
        return None
    try:
        if _V1.fullmatch(path):
            return _of_v1(query, headers, body)
        return _of_v2(headers, body) if _V2.fullmatch(path) else None
    except (ServiceError, ValueError):  # whoever reads it whole will say so
        return None


def _of_v1(query: bytes, headers: Headers, body: bytes | bytearray) -> float | None:
    """Of a raw body from the query; else of JSON whose one member of that name is found without parsing it."""
    content_type = next((value for name, value in headers if name == b"content-type"), b"")
    if is_read(content_type.decode("latin-1"), (OCTETS,), unnamed=False):
        return with_headers(with_query(query), headers).latency_budget_ms
    if len(body) > _LONGEST_SOUGHT or body.count(_BUDGET) > 1 or b"\\u" in body:
        return None
    place = body.find(_BUDGET)
    if place < 0:
        return with_headers(Wishes(), headers).latency_budget_ms
    value = _NUMBER.match(body, place + len(_BUDGET))
    return budget_ms if value and (budget_ms := float(value[1])) > 0 else None


def _of_v2(headers: Headers, body: bytes | bytearray) -> float | None:
    """Of JSON that is short: members of this name and of `timeout` can be anywhere in it, and mean nothing there."""
    lengths = [value for name, value in headers if name == _HEADER_LENGTH]
    length = int(lengths[0]) if lengths else len(body)
    if len(lengths) > 1 or not 0 <= length <= min(len(body), _LONGEST_PARSED):
        return None
    content = from_json(bytes(body[:length])) if length else {}
    given = content.get("parameters", {}) if isinstance(content, dict) else None
    return with_headers(read_parameters(given), headers).budget_ms if isinstance(given, dict) else None
