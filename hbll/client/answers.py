"""What calls return: the server's JSON as frozen dataclasses. Members that this version does not know are left out, so that
a newer server does no harm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from hbll.client.errors import UnexpectedAnswer

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One row's answer. `stopped_by` says why it has this depth, and is none on the way to a deeper one; `certified` is
    none without `max_risk`; `probabilities`, by label, only if asked for."""

    label: str
    confidence: float
    depth: int
    path: str
    stopped_by: str | None
    certified: bool | None = None
    probabilities: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Risk:
    """What was certified: with probability `1 - delta` over the certification data, answers differ from the reference
    path's with probability `epsilon` at most, for inputs that are drawn like those."""

    epsilon: float
    delta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answers to all rows, in their order.

    `queue_ms`, `compute_ms` and `total_ms` are the server's, `elapsed_ms` is from the call to its end as this side saw it:
    the difference is the network, the client, and what was tried before in vain. `deadline_met` is as this side saw it
    too, and none without a budget. `requests` were sent for it, hedges included, those that ask what is served not.
    """

    model: str
    version: int
    predictions: tuple[Prediction, ...]
    deadline_met: bool | None
    risk: Risk | None
    queue_ms: float
    compute_ms: float
    total_ms: float
    elapsed_ms: float
    requests: int
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """An event of a stream: the answer of `row` at one rung, `total_ms` after the request reached the server; `final` if no
    deeper one of this row follows."""

    row: int
    final: bool
    total_ms: float
    prediction: Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A served model, in the version that answers where none is named; `versions` are all that are, highest first."""

    name: str
    version: int
    ready: bool
    versions: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """A path that a model offers. Accuracies are shares; `latency_ms` is of one row there, none until the model is warm."""

    path: str
    depth: int
    accuracy: float
    test_accuracy: float
    agreement: float
    latency_ms: float | None
    flops: int
    parameters: int
    pareto: bool
    best_of_depth: bool
    weights_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a version takes there: its weights, those of all its paths if each were loaded alone, and by how much the server
    grew with it (none where its system does not tell)."""

    weights_bytes: int
    separate_bytes: int
    grown_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDetail(Model):
    """A served model with all that it offers: rows have `input_shape` and are of `input_datatype`, FP32 or, where they are
    tokens, INT64; `max_risk` can be one of `risk_levels`. `features` are the columns of a table, in the order of the input.
    """

    hierarchy_depth: int
    input_shape: tuple[int, ...]
    input_datatype: str = "FP32"
    features: tuple[str, ...] | None = None
    labels: tuple[str, ...]
    reference: str
    climb: tuple[str, ...]
    risk_levels: tuple[float, ...]
    paths: tuple[Path, ...]
    memory: Memory | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedAnswer:
    """An answer on the way, expected `expected_ms` from now; `accuracy` is its path's on validation data."""

    path: str
    depth: int
    accuracy: float
    expected_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What an average row would get now, and why; `answers` in order, the last is the one above."""

    model: str
    version: int
    policy: str
    path: str
    depth: int
    expected_ms: float
    feasible: bool
    reason: str
    answers: tuple[PlannedAnswer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """Whether the server takes requests; certified levels that its audits have refuted, by model."""

    ready: bool
    drift_alarms: Mapping[str, tuple[float, ...]]


def read(kind: type[T], content: Any, **members: Any) -> T:
    """A `kind` from a JSON object; `members` are already read and win; lists become tuples.

    Raises:
        UnexpectedAnswer: it is no object, or lacks a member that has no default.
    """
    found = dict(_object(content), **members)
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    try:
        return kind(**{name: _frozen(value) for name, value in found.items() if name in known})
    except TypeError as exc:
        raise UnexpectedAnswer(f"expected the members of {kind.__name__}, got {sorted(found)}: {exc}") from exc


def read_all(kind: type[T], content: Any, name: str) -> tuple[T, ...]:
    """One `kind` for each item of the list that the JSON object has as `name`.

    Raises:
        UnexpectedAnswer: it has no such list, or an item lacks something.
    """
    items = _object(content).get(name)
    if not isinstance(items, list):
        raise UnexpectedAnswer(f"expected a list {name!r}, got {type(items).__name__}")
    return tuple(read(kind, item) for item in items)


def read_answer(
    content: Any,
    predictions: tuple[Prediction, ...],
    *,
    rows: int,
    budget_ms: float | None,
    elapsed_ms: float,
    **members: Any,
) -> Answer:
    """The `Answer` to a call of `rows` rows that took `elapsed_ms` in all.

    Raises:
        UnexpectedAnswer: something is missing, or there is another number of predictions.
    """
    if len(predictions) != rows:
        raise UnexpectedAnswer(f"expected {rows} predictions, got {len(predictions)}")
    found = _object(content)
    risk = read(Risk, found["risk"]) if found.get("risk") is not None else None
    met = found.get("deadline_met")
    if met and budget_ms is not None:
        met = elapsed_ms <= budget_ms
    members |= {"risk": risk, "deadline_met": met, "predictions": predictions, "elapsed_ms": elapsed_ms}
    return read(Answer, found, **members)


def _object(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UnexpectedAnswer(f"expected a JSON object, got {type(content).__name__}")
    return content


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _frozen(item) for name, item in value.items()}
    return tuple(value) if isinstance(value, list) else value
