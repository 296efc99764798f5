"""Bodies of requests and answers: with the routes, the source of openapi.yaml."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from service.policy.wish import StoppedBy

_INPUT_SCHEMA = {
    "anyOf": [
        {"type": "array", "items": {}, "description": "numbers, nested to the shape that the model wants"},
        {
            "type": "object",
            "required": ["image"],
            "additionalProperties": False,
            "properties": {"image": {"type": "string", "description": "base64 of a PNG, JPEG, WebP, BMP or GIF file"}},
        },
        {
            "type": "object",
            "required": ["tensor", "datatype", "shape"],
            "additionalProperties": False,
            "properties": {
                "tensor": {"type": "string", "description": "base64 of little-endian row-major values"},
                "datatype": {"enum": ["FP32", "INT64"], "description": "the model's; INT64: tokens"},
                "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}},
            },
        },
    ]
}

ABOUT_DEPTH = ("depth", "path", "min_confidence", "max_risk")
"""The wishes of which a request has at most one."""

Row = Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)]
"""One input; numbers are checked as an array, not one by one."""


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _first_unknown(cls, given: Any) -> Any:
        """pydantic would collect an error for each of a million unknown members, and one is enough to refuse them all."""
        if not isinstance(given, dict) or len(given) <= len(cls.model_fields):
            return given
        unknown = next(name for name in given if name not in cls.model_fields)
        return {name: value for name, value in given.items() if name in cls.model_fields} | {unknown: given[unknown]}


class _Inputs(_Schema):
    inputs: list[Row] = Field(min_length=1, description="one entry per row")


class _OneWish(_Schema):
    """At most one of the wishes about depth."""

    @model_validator(mode="after")
    def _one_wish(self) -> Self:
        if len(self.wishes) > 1:
            raise ValueError(f"give only one of depth, path, min_confidence and max_risk, got {' and '.join(self.wishes)}")
        return self

    @property
    def wishes(self) -> list[str]:
        """The names of the wishes about depth that are given; at most one, once validated."""
        return [name for name in ABOUT_DEPTH if getattr(self, name) is not None]


class Wishes(_OneWish):
    """What a request wishes for: at most one kind of wish about depth, and a budget."""

    depth: Annotated[int, Field(ge=1, strict=True)] | Literal["best", "full"] | None = Field(
        None,
        description="blocks to run: the offered path of that depth that is best on validation; best: the reference path",
    )
    path: str | None = Field(None, description="the nodes of an offered path, like 4-6-7")
    latency_budget_ms: float | None = Field(
        None, gt=0, allow_inf_nan=False, strict=True, description="time from the request's arrival to its answer"
    )
    min_confidence: float | None = Field(
        None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        strict=True,
        description="go deeper until the calibrated confidence is at least this",
    )
    max_risk: float | None = Field(
        None,
        gt=0,
        lt=1,
        allow_inf_nan=False,
        strict=True,
        description="one of the model's certified levels: go deeper until the answer differs from the reference path's "
        "with at most this probability",
    )
    strict: bool = Field(False, strict=True, description="refuse with 504 at once rather than answer late")


class PredictRequest(Wishes, _Inputs):  # in this order the fields of `_Inputs` come first
    """Inputs and, at most, one kind of wish about depth."""

    probabilities: bool = Field(False, strict=True, description="return the probability of every label")

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"inputs": [{"image": "iVBORw0KGgo..."}], "latency_budget_ms": 5}]},
    )


class StreamRequest(PredictRequest):
    """As for predict; without a wish about depth the stream climbs to the reference path."""

    monotone: bool = Field(
        False,
        strict=True,
        description="each event carries the most confident answer so far, so the confidence never falls; not with max_risk",
    )

    @model_validator(mode="after")
    def _certifies_what_it_returns(self) -> StreamRequest:
        if self.monotone and self.max_risk is not None:
            raise ValueError("monotone answers are not those that max_risk certifies: give only one of the two")
        return self


class Prediction(_Schema):
    """One row's answer."""

    label: str
    confidence: float = Field(description="calibrated probability of the label, 0..1")
    depth: int = Field(description="blocks run")
    path: str
    stopped_by: StoppedBy | None = Field(description="why the answer has this depth; null on the way to a deeper one")
    certified: bool | None = Field(
        None, description="with max_risk: whether the certificate covers this answer; false if the deadline cut it short"
    )
    probabilities: dict[str, float] | None = Field(None, description="by label; only if asked for")


class Risk(_Schema):
    """What was certified, for the rows whose `certified` is true: with probability at least `1 - delta` over the
    certification data, an answer differs from the reference path's with probability at most `epsilon`, for inputs
    that are drawn like those."""

    epsilon: float
    delta: float


class PredictResponse(_Schema):
    """The answers in the order of the inputs."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "digits",
                    "version": 2,
                    "predictions": [
                        {
                            "label": "6",
                            "confidence": 0.998,
                            "depth": 5,
                            "path": "1-2-4-6-7",
                            "stopped_by": "complete",
                            "certified": None,
                            "probabilities": None,
                        }
                    ],
                    "deadline_met": True,
                    "risk": None,
                    "queue_ms": 0.6,
                    "compute_ms": 0.3,
                    "total_ms": 1.1,
                }
            ]
        }
    )

    model: str
    version: int
    predictions: list[Prediction]
    deadline_met: bool | None = Field(description="null where the request had no budget")
    risk: Risk | None = Field(None, description="only with max_risk")
    queue_ms: float = Field(description="from arrival to the first block")
    compute_ms: float = Field(description="in inference, batches shared with other requests included whole")
    total_ms: float = Field(description="from arrival to the answer")


class StreamAnswer(Prediction):
    """The event `answer`: one row's answer at one rung."""

    row: int = Field(description="index in inputs")
    final: bool = Field(description="no further answer of this row follows")
    total_ms: float = Field(description="from arrival to this answer")


class StreamEnd(_Schema):
    """The event `end`: every row has its final answer."""

    model: str
    version: int
    deadline_met: bool | None = Field(description="null where the request had no budget")
    risk: Risk | None = Field(None, description="only with max_risk")
    queue_ms: float
    compute_ms: float
    total_ms: float


def _event(name: str, model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a server-sent event; models within `model` are those of the document."""
    content = model.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
    content.pop("$defs", None)
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    return {"type": "object", "properties": {"event": {"const": name}, "data": data}, "required": ["event", "data"]}


class ModelSummary(_Schema):
    """A served model in one version."""

    name: str
    version: int
    ready: bool
    versions: list[int] = Field(
        description="all that are served, highest first; the first answers where none is named", examples=[[3, 2]]
    )


class ModelList(_Schema):
    """All served models."""

    models: list[ModelSummary]


class VersionSummary(_Schema):
    """A version of a model."""

    version: int
    ready: bool
    default: bool = Field(description="answers where no version is named")
    reason: str | None = Field(
        description="why it is not served, although it should be; or that its folder has another bundle by now",
        examples=["models/digits/3/weights.bin is truncated or changed: ... Copy the bundle again, whole"],
    )


class ModelVersions(_Schema):
    """The versions of a model, highest first: those that are served, and those that should be and cannot."""

    name: str
    policy: Literal["latest", "all"] | int | list[int] = Field(
        description="the setting `versions`: latest, all, how many of the highest, or a list",
        examples=["latest", 2, [1, 3]],
    )
    versions: list[VersionSummary]


class PathSummary(_Schema):
    """One offered path. Accuracies are shares, 0..1."""

    path: str
    depth: int
    accuracy: float = Field(description="on validation data: what paths are chosen by")
    test_accuracy: float
    agreement: float = Field(description="share of validation rows answered as the reference path answers")
    latency_ms: float | None = Field(description="one row, measured here at warm-up (a high quantile); null until warm")
    flops: int
    parameters: int
    weights_bytes: int = Field(
        description="what its parameters take in FP32: what it would hold by itself, and shares with the other paths here",
        examples=[90856],
    )
    pareto: bool = Field(description="no path of as few or fewer blocks is as accurate")
    best_of_depth: bool = Field(description="what `depth` chooses")


class ModelMemory(_Schema):
    """What a version takes in memory."""

    weights_bytes: int = Field(description="its weights on disk: of all paths together, once", examples=[835776])
    separate_bytes: int = Field(
        description="the weights of all served paths, if each were loaded by itself", examples=[8338600]
    )
    grown_bytes: int | None = Field(
        description="by how much the server's memory (proportional set size) grew while this version was loaded and "
        "measured, whatever else it did meanwhile; the first model also pays for the runtime, and what an earlier version "
        "left is used again; null where the system does not tell",
        examples=[9224192],
    )


class ModelDetail(ModelSummary):
    """A served model with all that it offers."""

    hierarchy_depth: int
    input_shape: list[int]
    input_datatype: str = Field(description="FP32, or INT64: tokens")
    features: list[str] | None = Field(
        description="the columns of a table, in the order of the input; null for other models"
    )
    labels: list[str]
    reference: str = Field(description="the path that is best on validation")
    climb: list[str] = Field(description="where a request with min_confidence or max_risk is answered, in order")
    risk_levels: list[float] = Field(description="what max_risk can be")
    memory: ModelMemory
    paths: list[PathSummary]


class PlanQuery(_OneWish):
    """The wishes of a request that is not sent yet."""

    rows: int = Field(1, ge=1, le=4096, description="rows of the request")
    depth: Annotated[int, Field(ge=1)] | Literal["best", "full"] | None = None
    path: str | None = None
    latency_budget_ms: float | None = Field(None, gt=0, allow_inf_nan=False)
    min_confidence: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    max_risk: float | None = Field(None, gt=0, lt=1, allow_inf_nan=False)
    strict: bool = False

    def as_wishes(self) -> Wishes:
        """What `service.call.open_call` reads."""
        return Wishes.model_validate(self.model_dump(exclude={"rows"}, exclude_none=True))


class PlannedAnswer(_Schema):
    """An answer on the way; `accuracy` is that of its path on validation data."""

    path: str
    depth: int
    accuracy: float
    expected_ms: float = Field(description="from now, by the live profile and what waits")


class Plan(_Schema):
    """What an average row would get now."""

    model: str
    version: int
    policy: str
    path: str
    depth: int
    expected_ms: float
    feasible: bool = Field(description="whether the first answer is expected within the budget")
    reason: str
    answers: list[PlannedAnswer] = Field(description="in order; the last is the one above")


class AuditedLevel(_Schema):
    """One certified level."""

    epsilon: float
    audits: int
    disagreements: int
    evidence: float = Field(description="against the level still holding: 1 at first; the alarm is raised at 100")
    alarm: bool = Field(description="early exits at this level are off: such requests get the reference path")


class Audits(_Schema):
    """The audits of a model."""

    model: str
    version: int
    audit_rate: float
    levels: list[AuditedLevel]


class Live(_Schema):
    """The process answers."""

    live: bool


class Ready(_Schema):
    """Whether every model is loaded and warm."""

    ready: bool


class Readiness(Ready):
    """The same, and what an operator has to know."""

    drift_alarms: dict[str, list[float]] = Field(
        default_factory=dict,
        description="certified levels that audits have refuted, by model; they no longer exit early "
        "(in which versions: /v1/models/{model}/versions/{version}/audits)",
    )


class Error(BaseModel):
    """The one shape of every answer that is not a success; some codes add members."""

    model_config = ConfigDict(extra="allow")

    error: str = Field(description="a sentence for people: what was expected and what came")
    code: str = Field(description="stable, for programs")


EVENT_SCHEMA: dict[str, Any] = {"oneOf": [_event("answer", StreamAnswer), _event("end", StreamEnd), _event("error", Error)]}
"""Of each event of a stream."""
