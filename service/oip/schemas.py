"""Bodies of the protocol. Its objects may hold members that we do not know, so those are ignored, save a request's
parameters: a misspelt wish must not be answered as if it had not been made."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, WithJsonSchema

from service.schemas import Wishes

MOST_TENSORS = MOST_PARAMETERS = 100
"""Of a request: one input, seven outputs and a dozen parameters mean something here, and to read each takes time."""

_MAX_INT64 = 2**63 - 1


def _scalars(parameters: Any) -> Any:
    for name, value in parameters.items() if isinstance(parameters, dict) else ():
        if not isinstance(value, (bool, int, float, str)):
            raise ValueError(f"expected a string, number or boolean as {name[:80]!r}, got {type(value).__name__}")  # noqa: TRY004
    return {} if parameters is None else parameters


def _first_unknown(parameters: Any) -> Any:
    known = "unload_dependents"
    if not isinstance(parameters, dict) or parameters.keys() <= {known}:
        return parameters
    return {name: parameters[name] for name in [next(name for name in parameters if name != known)]}


# Checked by hand, and lists fail fast: pydantic would collect an error for each of a million bad members.
Parameters = Annotated[
    dict[str, Any],
    BeforeValidator(_scalars),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}),
]


class _Object(BaseModel):
    model_config = ConfigDict(extra="ignore")


class RequestInput(_Object):
    """An input tensor: its values in `data`, nested or flat, row by row, or in the binary part of the body."""

    name: str
    shape: list[StrictInt] = Field(fail_fast=True, description="rows first")
    datatype: str = Field(description="FP32, or another of numbers, which are then converted")
    parameters: Parameters = Field(default_factory=dict, description="binary_data_size: bytes in the binary part")
    data: list[Any] | None = None


class RequestOutput(_Object):
    """An output tensor that is asked for."""

    name: str
    parameters: Parameters = Field(default_factory=dict, description="binary_data: in the binary part of the answer?")


class InferenceRequest(_Object):
    """One input tensor, the outputs that are wanted (none named: all), and wishes about depth among the parameters."""

    id: str | None = Field(None, description="comes back in the answer")
    parameters: Parameters = Field(default_factory=dict, description="see InferenceParameters")
    inputs: list[RequestInput] = Field(fail_fast=True, max_length=MOST_TENSORS)
    outputs: list[RequestOutput] = Field(default_factory=list, fail_fast=True, max_length=MOST_TENSORS)

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "42",
                    "inputs": [{"name": "x", "shape": [1, 2, 2], "datatype": "FP32", "data": [0, 0.5, 1, 0]}],
                    "outputs": [{"name": "label"}, {"name": "confidence"}],
                    "parameters": {"latency_budget_ms": 5},
                }
            ]
        }
    )


class InferenceParameters(Wishes):
    """The parameters of a request: our wishes, and those of the protocol's extensions."""

    timeout: int | None = Field(
        None,
        ge=0,
        le=_MAX_INT64,
        strict=True,
        description="microseconds; the smaller of it and latency_budget_ms counts; 0: none",
    )
    priority: int = Field(0, ge=0, le=_MAX_INT64, strict=True, description="1 is the highest; 0: none given")
    binary_data_output: bool = Field(False, strict=True, description="outputs are binary unless they say otherwise")

    @property
    def budget_ms(self) -> float | None:
        """The smaller of the budget and the timeout."""
        given = [budget for budget in (self.latency_budget_ms, self.timeout and self.timeout / 1000) if budget]
        return min(given, default=None)


class ResponseOutput(_Object):
    """An output tensor, flat and row by row in `data`, or in the binary part if it has a `binary_data_size`."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: list[Any] = Field(default_factory=list)


class ResponseParameters(_Object):
    """What concerns the request as a whole."""

    depth: int = Field(description="the greatest of its rows'")
    deadline_met: bool | None = Field(None, description="only with a budget")
    certified: bool | None = Field(None, description="only with max_risk: whether the certificate covers all rows")
    queue_ms: float = Field(description="from arrival to the first block")
    compute_ms: float = Field(description="in inference, batches shared with other requests included whole")
    total_ms: float = Field(description="from arrival to the answer")


class InferenceResponse(_Object):
    """The answer, a row for each row of the input."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model_name": "digits",
                    "model_version": "2",
                    "id": "42",
                    "parameters": {"depth": 2, "deadline_met": True, "queue_ms": 0.6, "compute_ms": 0.3, "total_ms": 1.1},
                    "outputs": [
                        {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["6"]},
                        {"name": "confidence", "datatype": "FP32", "shape": [1], "data": [0.998]},
                    ],
                }
            ]
        }
    )

    model_name: str
    model_version: str
    id: str | None = Field(None, description="the request's, if it had one")
    parameters: ResponseParameters
    outputs: list[ResponseOutput]


class ServerMetadata(_Object):
    """The server and the extensions of the protocol that it serves."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(_Object):
    """A tensor; -1 in its shape is the free number of rows."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(_Object):
    """A model as a function of tensors."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelReady(_Object):
    """Whether a model answers."""

    name: str
    ready: bool


class TensorConfig(_Object):
    """A tensor without its axis of rows. `reshape` says that a row is a single number."""

    name: str
    data_type: str
    dims: list[int]
    reshape: dict[str, list[int]] | None = None


class ModelConfig(_Object):
    """What clients of the model configuration extension look for."""

    name: str
    platform: str
    backend: str
    max_batch_size: int = Field(description="rows of one request")
    input: list[TensorConfig]
    output: list[TensorConfig]
    dynamic_batching: dict[str, Any] = Field(description="that there is some")
    version_policy: dict[str, Any] = Field(
        description="which versions are served: latest, all, or specific ones", examples=[{"latest": {"num_versions": 1}}]
    )


class Duration(_Object):
    """How often, and how many nanoseconds together."""

    count: int
    ns: int


class InferenceStatistics(_Object):
    """Times of requests. Those of input and output are not taken apart here; nothing is cached."""

    success: Duration
    fail: Duration = Field(description="of requests that were admitted")
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


class ModelStatistics(_Object):
    """A model's work since the server became ready."""

    name: str
    version: str
    last_inference: int = Field(description="milliseconds since 1970; 0: never")
    inference_count: int = Field(description="rows answered")
    execution_count: int = Field(description="batches run; a row can be in several, one per rung")
    inference_stats: InferenceStatistics
    batch_stats: list[Any] = Field(description="always empty: /metrics has the sizes of batches")


class Statistics(_Object):
    """All that were asked for."""

    model_stats: list[ModelStatistics]


class IndexRequest(_Object):
    """What to list."""

    ready: bool = Field(False, strict=True, description="only models that answer")


class LoadRequest(_Object):
    """Nothing can be chosen."""

    parameters: dict[str, Any] = Field({}, max_length=0, description="must be empty")


class UnloadRequest(_Object):
    """What Triton's clients say makes no difference: no model depends on another."""

    parameters: Annotated[dict[Literal["unload_dependents"], StrictBool], BeforeValidator(_first_unknown)] = Field(
        {}, description="unload_dependents: either"
    )


class IndexEntry(_Object):
    """A version of a model; `reason` says why one that should be served is not, or that it was `unloaded`."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNAVAILABLE"]
    reason: str
