"""Requests as data: built here from what a caller wishes, sent elsewhere. And answers of any kind, checked."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict
from urllib.parse import quote

from hbll.client.errors import InvalidRequest, UnexpectedAnswer, error_of
from hbll.client.inputs import Row, json_rows, raw_body


class Wishes(TypedDict, total=False):
    """What a request can wish for: at most one of `depth` (blocks to run, or best, or full), `path`, `min_confidence` and
    `max_risk`; a `latency_budget_ms`, from the call to its answer; with `strict` no answer rather than a late one."""

    depth: int | Literal["best", "full"] | None
    path: str | None
    latency_budget_ms: float | None
    min_confidence: float | None
    max_risk: float | None
    strict: bool


class PredictOptions(Wishes, total=False):
    """Wishes, and about the call: the `version` of the model (default: the newest), `probabilities` of every label, how
    long the whole call may take (default: as the client was made), and an id for the logs (default: a random one)."""

    version: int | None
    probabilities: bool
    timeout_s: float | None
    request_id: str | None


class StreamOptions(PredictOptions, total=False):
    """The same; `monotone` events carry the most confident answer so far."""

    monotone: bool


@dataclass(frozen=True, slots=True)
class Request:
    """A request but for its budget, which is known when it is sent: a header then, which counts where body and query are
    silent. All of them can be sent again: they ask, and change nothing at the server."""

    method: Literal["GET", "POST"]
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None

    def within(self, budget_ms: float | None) -> Request:
        """The same with that budget."""
        if budget_ms is None:
            return self
        return replace(self, headers={**self.headers, "X-Latency-Budget-Ms": repr(budget_ms)})


def predict_request(model: str, rows: Sequence[Row], options: PredictOptions) -> Request:
    """Ask for one answer."""
    path = f"{model_path(model, options.get('version'))}/predict"
    wishes = _said(options, ("depth", "path", "min_confidence", "max_risk", "strict", "probabilities"))
    body = raw_body(rows)
    if body is None:
        return _json_request(path, rows, wishes)
    return Request("POST", path, _query(wishes), {"Content-Type": "application/octet-stream"}, body)


def stream_request(model: str, rows: Sequence[Row], options: StreamOptions) -> Request:
    """Ask for the answer of every rung."""
    wishes = _said(options, ("depth", "path", "min_confidence", "max_risk", "strict", "probabilities", "monotone"))
    return _json_request(f"{model_path(model, options.get('version'))}/predict/stream", rows, wishes)


def plan_request(model: str, version: int | None, rows: int, wishes: Wishes) -> Request:
    """Ask what a request would get."""
    said = _said(wishes, ("depth", "path", "latency_budget_ms", "min_confidence", "max_risk", "strict"))
    return Request("GET", f"{model_path(model, version)}/plan", {"rows": str(rows), **_query(said)})


def model_path(model: str, version: int | None) -> str:
    """Where a model is.

    Raises:
        InvalidRequest: the name cannot be part of a URL.
    """
    if model in ("", ".", ".."):
        raise InvalidRequest(f"model: expected a name, got {model!r}")
    return f"/v1/models/{quote(model, safe='')}" + ("" if version is None else f"/versions/{int(version)}")


def check_options(options: Mapping[str, Any], kind: type[Wishes]) -> None:
    """What type checkers would have said, for who has none.

    Raises:
        TypeError: an option that `kind` does not have.
    """
    unknown = options.keys() - kind.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}: expected some of {', '.join(kind.__annotations__)}")


def budget_of(options: Wishes) -> float | None:
    """The budget, in milliseconds.

    Raises:
        InvalidRequest: it is not above 0.
    """
    budget_ms: float | None = _said(options, ("latency_budget_ms",)).get("latency_budget_ms")
    if budget_ms is not None and budget_ms <= 0:
        raise InvalidRequest(f"latency_budget_ms: expected a number above 0, got {budget_ms:g}")
    return budget_ms


def content_of(status: int, body: bytes, retry_after: str | None = None) -> dict[str, Any]:
    """The JSON object of an answer.

    Raises:
        HbllError: it is an error, or no JSON object.
    """
    try:
        content = json.loads(body)
    except ValueError:
        content = None
    if status != 200:
        raise error_of(status, content, retry_after)
    if not isinstance(content, dict):
        raise UnexpectedAnswer("expected JSON, got something else. Is it an HBLL server, and is the URL right?", status=200)
    return content


def _json_request(path: str, rows: Sequence[Row], wishes: dict[str, Any]) -> Request:
    body = json.dumps({"inputs": json_rows(rows), **wishes}).encode()
    return Request("POST", path, headers={"Content-Type": "application/json"}, body=body)


def _query(said: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in said.items()}


def _said(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Those of the options that say something, with plain numbers."""
    said: dict[str, Any] = {}
    for name in names:
        value = options.get(name)
        if value is None or value is False:
            continue
        if name in ("latency_budget_ms", "min_confidence", "max_risk"):
            try:
                value = float(value)
            except (TypeError, ValueError):
                value = math.nan
            if not math.isfinite(value):
                raise InvalidRequest(f"{name}: expected a finite number, got {options[name]!r}")
        elif name == "depth" and not isinstance(value, str):
            try:
                value = operator.index(value)
            except TypeError as exc:
                raise InvalidRequest(f"depth: expected a whole number, best or full, got {value!r}") from exc
        said[name] = value
    return said
