"""A body of the protocol <-> its JSON header and the binary tensors after it (the binary tensor data extension)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_json
from starlette.responses import Response

from family.manifest import Manifest
from service.answers import RowAnswer
from service.bodies import parse
from service.encodings import compress
from service.errors import BadRequest, InvalidInput
from service.oip.schemas import InferenceParameters, InferenceRequest, RequestInput
from service.oip.tensors import Output, describe_output
from service.responses import describe

HEADER_LENGTH = "Inference-Header-Content-Length"

_PARAMETERS = InferenceParameters.model_fields.keys()


def read_request(body: bytes, header_length: str | None, manifest: Manifest) -> tuple[InferenceRequest, memoryview]:
    """A request's JSON, and a view of what follows it.

    Without `header_length`, the header of that name, the body is all JSON. With 0 it is all tensor: one row of the
    model's input, whose outputs come back binary.

    Raises:
        BadRequest: the length is none, or beyond the body; the JSON is no inference request.
        MalformedInput: the JSON cannot be parsed.
    """
    if header_length is None:
        return parse(InferenceRequest, body, BadRequest), memoryview(b"")
    if not (header_length.isascii() and header_length.isdecimal() and len(header_length) < 19):
        raise BadRequest(f"expected {HEADER_LENGTH} to be a number of bytes, got {header_length[:40]!r}")
    length = int(header_length)
    if length > len(body):
        raise BadRequest(f"expected {HEADER_LENGTH} to be within the body's {len(body)} bytes, got {length}")
    view = memoryview(body)
    if length:
        return parse(InferenceRequest, bytes(view[:length]), BadRequest), view[length:]
    shape = [1, *manifest.input.shape[1:]]
    parameters = {"binary_data_size": len(body)}
    tensor = RequestInput(name=manifest.input.name, shape=shape, datatype=manifest.input.datatype, parameters=parameters)
    return InferenceRequest(inputs=[tensor], parameters={"binary_data_output": True}), view


def read_parameters(given: dict[str, Any]) -> InferenceParameters:
    """A request's parameters.

    Raises:
        BadRequest: one is unknown.
        InvalidInput: one has a wrong type or is out of range, or wishes exclude each other.
    """
    for name in given:
        if name not in _PARAMETERS:
            raise BadRequest(f"parameters: expected some of {', '.join(_PARAMETERS)}, got {name[:40]!r}")
    try:
        return InferenceParameters.model_validate(given)
    except ValidationError as exc:
        raise InvalidInput(f"parameters: {describe(exc.errors(include_url=False)[0])}") from exc


def write_response(
    header: dict[str, Any],
    wanted: Sequence[tuple[Output, bool]],
    rows: Sequence[RowAnswer],
    manifest: Manifest,
    coding: str | None,
) -> Response:
    """The answer: `header` and the outputs `wanted` of `rows`, those with true in the binary part, all in `coding`."""
    described, parts = [], []
    for output, binary in wanted:
        tensor, part = describe_output(output, rows, manifest, binary=binary)
        described.append(tensor)
        parts.append(part)
    json = to_json({**header, "outputs": described})
    headers, media_type = {}, "application/json"
    if any(binary for _, binary in wanted):
        headers[HEADER_LENGTH] = str(len(json))  # before compression
        media_type = "application/octet-stream"
    body = b"".join((json, *parts))
    if coding is not None:
        headers["Content-Encoding"] = coding
        body = compress(body, coding)
    return Response(body, media_type=media_type, headers=headers)
