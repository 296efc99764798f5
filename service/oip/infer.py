"""The route that answers."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from service.answers import Answer
from service.call import Call, count_answered, count_failed, learn_send, open_call, trace
from service.context import context_of, errors, milliseconds
from service.encodings import accepted_coding
from service.errors import ServiceError
from service.media import JSON, OCTETS, reading
from service.oip.schemas import InferenceParameters, InferenceRequest, InferenceResponse
from service.oip.tensors import read_rows, require_input, require_outputs
from service.oip.wire import HEADER_LENGTH, read_parameters, read_request, write_response
from service.presence import while_connected
from service.versions import for_models, served_model
from service.wishes import HEADER_PARAMETERS, with_headers

router = APIRouter(redirect_slashes=False, route_class=reading(JSON, OCTETS, unnamed=True))


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without `$defs`, whose references would mean something else within an OpenAPI document."""
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return inline(definitions[node["$ref"].rpartition("/")[2]])
            return {key: inline(value) for key, value in node.items()}
        return [inline(each) for each in node] if isinstance(node, list) else node

    inlined: dict[str, Any] = inline(schema)
    return inlined


def _request_schema() -> dict[str, Any]:
    schema = _inlined(InferenceRequest.model_json_schema())
    schema["properties"]["parameters"] = _inlined(InferenceParameters.model_json_schema())
    return schema


_DESCRIBED = {
    "parameters": [
        *HEADER_PARAMETERS,
        {
            "name": HEADER_LENGTH,
            "in": "header",
            "required": False,
            "schema": {"type": "integer", "minimum": 0},
            "description": "bytes of JSON before the binary part; 0: the body is one row of the input and nothing else",
        },
    ],
    "requestBody": {
        "required": True,
        "content": {
            JSON: {"schema": _request_schema()},
            OCTETS: {"schema": {"type": "string", "format": "binary", "description": "JSON, then tensors"}},
        },
    },
}


@for_models(
    router,
    "/v2",
    "POST",
    "/infer",
    tags=["open inference protocol"],
    response_model=InferenceResponse,
    responses={
        **errors(400, 404, 413, 415, 422, 429, 500, 503, 504),
        200: {
            "description": "JSON, or where outputs are binary JSON and then tensors",
            "content": {OCTETS: {"schema": {"type": "string", "format": "binary"}}},
        },
    },
    openapi_extra=_DESCRIBED,
)
async def infer(request: Request) -> Response:
    """Answer each row at the depth that the wishes and the budget allow."""
    # The body and the dependencies are read by hand: FastAPI's ways would cost as much as all the rest here.
    ctx, served = context_of(request), served_model(request)
    manifest = served.manifest
    message, binary = read_request(await request.body(), request.headers.get(HEADER_LENGTH), manifest)
    parameters = with_headers(read_parameters(message.parameters), request.scope["headers"])
    wanted = require_outputs(message.outputs, parameters.binary_data_output)
    tensor = require_input(message.inputs, manifest, ctx.settings.max_request_rows)
    wishes = parameters.model_copy(update={"latency_budget_ms": parameters.budget_ms})
    arrived_s: float = request.state.arrived_s
    call = open_call(ctx, served, wishes, tensor.shape[0], arrived_s, priority=parameters.priority)
    x = read_rows(tensor, binary, manifest)
    try:
        answer = await while_connected(request, ctx.engine.submit(served, x, call.wish, arrived_s))
    except ServiceError as error:
        count_failed(ctx.metrics, call)
        trace(ctx, request, call, (), error.status)
        raise
    total_s = call.total_s
    count_answered(ctx.metrics, call, total_s)
    learn_send(call, answer)
    trace(ctx, request, call, answer.spans, 200)
    header = _header(call, answer, message.id, total_s)
    coding = accepted_coding(request.headers.get("accept-encoding", ""))
    return write_response(header, wanted, answer.rows, manifest, coding)


def _header(call: Call, answer: Answer, request_id: str | None, total_s: float) -> dict[str, Any]:
    """The answer's JSON without its outputs; what does not apply to it is left out."""
    parameters = {
        "depth": max(len(row.path) for row in answer.rows),
        "deadline_met": call.deadline_met(total_s),
        "certified": call.certified(answer),
        "queue_ms": milliseconds(answer.queue_s),
        "compute_ms": milliseconds(answer.compute_s),
        "total_ms": milliseconds(total_s),
    }
    header = {
        "model_name": call.served.name,
        "model_version": str(call.served.version),
        "id": request_id,
        "parameters": {name: value for name, value in parameters.items() if value is not None},
    }
    return {name: value for name, value in header.items() if value is not None}
