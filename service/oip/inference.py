"""A request for answers, by whichever transport it came: understood and admitted, and what is told of its answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from service.answers import Answer
from service.call import Arrival, Call, open_call
from service.context import Context, milliseconds
from service.oip.schemas import InferenceRequest, RequestInput
from service.oip.tensors import Output, as_rows, require_input, require_outputs
from service.oip.wire import read_parameters
from service.repository import ServedModel
from service.runtime import Rows
from service.wishes import with_headers

ReadValues = Callable[[RequestInput], NDArray[Any]]
"""The values of a checked input, in any shape of as many as its own shape says."""


@dataclass(frozen=True, slots=True)
class Inference:
    """A request that was admitted: `x (rows, *input_shape) float32`, and the outputs `wanted` of them, each with whether
    it is to be binary."""

    call: Call
    x: Rows
    wanted: list[tuple[Output, bool]]


def open_inference(
    ctx: Context,
    served: ServedModel,
    message: InferenceRequest,
    read_values: ReadValues,
    headers: Iterable[tuple[bytes, bytes]],
    arrival: Arrival,
    *,
    binary: bool = False,
    climb: bool = False,
    at_most_ms: float | None = None,
) -> Inference:
    """Everything before the engine. Where the request does not say whether outputs are binary, `binary` does.

    `climb` and `at_most_ms` are those of `service.call.open_call`.

    Raises:
        BadRequest: other tensors, outputs or parameters than the model and the protocol have.
        InvalidInput: a value or wish out of range.
        NotReady, QueueFull: see `service.call.open_call`.
    """
    parameters = with_headers(read_parameters(message.parameters), headers)
    if "binary_data_output" in parameters.model_fields_set:
        binary = parameters.binary_data_output
    wanted = require_outputs(message.outputs, binary)
    tensor = require_input(message.inputs, served.manifest, ctx.settings.max_request_rows)
    wishes = parameters.model_copy(update={"latency_budget_ms": parameters.budget_ms}) if parameters.timeout else parameters
    rows, priority = tensor.shape[0], parameters.priority
    call = open_call(ctx, served, wishes, rows, arrival, climb=climb, priority=priority, at_most_ms=at_most_ms)
    return Inference(call, as_rows(read_values(tensor), tensor, served.manifest), wanted)


def describe_answer(call: Call, answer: Answer, total_s: float) -> dict[str, Any]:
    """The parameters of an answer; what does not apply to it is left out."""
    parameters = {
        "depth": max(len(row.path) for row in answer.rows),
        "deadline_met": call.deadline_met(total_s),
        "certified": call.certified(answer),
        "queue_ms": milliseconds(answer.queue_s),
        "compute_ms": milliseconds(answer.compute_s),
        "total_ms": milliseconds(total_s),
    }
    return {name: value for name, value in parameters.items() if value is not None}
