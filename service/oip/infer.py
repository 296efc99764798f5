"""The route that answers."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from service.access import HttpArrival
from service.context import context_of, errors
from service.direct import DirectRoute
from service.encodings import accepted_coding
from service.media import JSON, OCTETS, reading
from service.oip.inference import describe_answer, open_inference
from service.oip.schemas import InferenceParameters, InferenceRequest, InferenceResponse
from service.oip.tensors import read_values
from service.oip.wire import HEADER_LENGTH, read_request, write_response
from service.presence import while_connected
from service.versions import for_models, model_urls, served_model
from service.wishes import HEADER_PARAMETERS

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
    ctx, served = context_of(request), served_model(request)
    manifest = served.manifest
    message, binary = read_request(await request.body(), request.headers.get(HEADER_LENGTH), manifest)
    values = partial(read_values, binary=binary)
    inference = open_inference(ctx, served, message, values, request.scope["headers"], HttpArrival(request))
    call = inference.call
    with call:
        answer = await while_connected(request, ctx.engine.submit(served, inference.x, call.wish, call.arrived_s))
    total_s = call.answered(answer)
    header = {
        "model_name": served.name,
        "model_version": str(served.version),
        "id": message.id,
        "parameters": describe_answer(call, answer, total_s),
    }
    if message.id is None:
        del header["id"]
    coding = accepted_coding(request.headers.get("accept-encoding", ""))
    return write_response(header, inference.wanted, answer.rows, manifest, coding)


direct_routes = [DirectRoute(f"{url}/infer", infer, JSON, OCTETS, unnamed=True) for url in model_urls("/v2")]
