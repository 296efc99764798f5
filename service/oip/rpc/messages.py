"""Messages of the protocol <-> what `service.oip` reads and tells."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray
from pydantic import BaseModel

from service.answers import RowAnswer
from service.errors import BadRequest, MalformedInput, RequestTimeout
from service.oip.inference import Inference
from service.oip.rpc.stubs import open_inference_pb2 as pb
from service.oip.schemas import MOST_PARAMETERS, MOST_TENSORS, InferenceRequest, RequestInput, RequestOutput
from service.oip.tensors import NUMBERS, describe_output, raw_values, require_datatype

M = TypeVar("M", bound=Message)
T = TypeVar("T")

_CONTENTS = {
    "BYTES": "bytes_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
}
"""The field of `contents` that has a datatype's values. FP16 has none."""


async def in_time(reading: Awaitable[T], timeout_s: float) -> T:
    """What a call's client sends.

    Raises:
        RequestTimeout: it did not within `timeout_s`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await reading
    except TimeoutError:
        raise RequestTimeout(f"expected a whole message within {timeout_s:g} s, got none") from None


def parse(kind: type[M], message: bytes) -> M:
    """A message of this kind.

    Raises:
        MalformedInput: the bytes are none.
    """
    try:
        return kind.FromString(message)
    except DecodeError as exc:
        raise MalformedInput(f"expected a {kind.DESCRIPTOR.full_name}, got bytes that are none: {exc}") from exc


def told(content: BaseModel, message: M) -> M:
    """What REST tells, as the message that tells the same: their members have the same names."""
    return ParseDict(content.model_dump(exclude_none=True), message)


def read_request(request: pb.ModelInferRequest) -> InferenceRequest:
    """A request without its tensors' values.

    Raises:
        BadRequest: a parameter or an output is named and has no value that is known here; there are far too many.
    """
    for what, tensors in (("inputs", request.inputs), ("outputs", request.outputs)):
        if len(tensors) > MOST_TENSORS:  # a message of 4 MB can have two million
            raise BadRequest(f"{what}: expected at most {MOST_TENSORS}, got {len(tensors)}")
    return InferenceRequest.model_construct(
        id=request.id or None,
        parameters=parameters_of(request),
        inputs=[
            RequestInput.model_construct(
                name=tensor.name,
                shape=list(tensor.shape),
                datatype=tensor.datatype,
                parameters=_parameters(f"input {tensor.name[:40]!r}", tensor.parameters),
                data=None,
            )
            for tensor in request.inputs
        ],
        outputs=[
            RequestOutput.model_construct(
                name=output.name, parameters=_parameters(f"output {output.name[:40]!r}", output.parameters)
            )
            for output in request.outputs
        ],
    )


def parameters_of(request: pb.ModelInferRequest) -> dict[str, Any]:
    """The parameters of a request.

    Raises:
        BadRequest: one has no value that is known here.
    """
    return _parameters("parameters", request.parameters)


def _parameters(where: str, given: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    if len(given) > MOST_PARAMETERS:
        raise BadRequest(f"{where}: expected at most {MOST_PARAMETERS} parameters, got {len(given)}")
    parameters: dict[str, Any] = {}
    for name, parameter in given.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise BadRequest(f"{where}: expected {name[:40]!r} to have a string, number or boolean, got none")
        parameters[name] = getattr(parameter, kind)
    return parameters


def values_of(request: pb.ModelInferRequest) -> Callable[[RequestInput], NDArray[Any]]:
    """How the values of the request's one input, once it is checked, are read.

    What is returned raises:
        BadRequest: there are more or fewer than the shape says, in both places or none, or none of the datatype.
    """

    def read(tensor: RequestInput) -> NDArray[Any]:
        (given,), raw = request.inputs, request.raw_input_contents
        if "shared_memory_region" in tensor.parameters:
            raise BadRequest(f"input {tensor.name!r}: shared_memory_region is not served here")
        if not raw:
            return _typed(given, tensor)
        if len(raw) > 1:
            raise BadRequest(f"raw_input_contents: expected one for each input, which is 1, got {len(raw)}")
        if given.HasField("contents"):
            raise BadRequest(f"input {tensor.name!r}: expected either contents or raw_input_contents, got both")
        return raw_values(tensor, raw[0], "raw_input_contents")

    return read


def _typed(given: pb.ModelInferRequest.InferInputTensor, tensor: RequestInput) -> NDArray[Any]:
    name, field = tensor.name, _CONTENTS.get(tensor.datatype)
    if field is None:
        raise BadRequest(f"input {name!r}: expected {tensor.datatype} in raw_input_contents, got none there")
    for other, _ in given.contents.ListFields():
        if other.name != field:
            raise BadRequest(f"input {name!r}: expected {tensor.datatype} in {field}, got {other.name}")
    found = getattr(given.contents, field)
    count = math.prod(tensor.shape)
    if len(found) != count:
        raise BadRequest(f"input {name!r}: expected {count} values for shape {tensor.shape}, got {len(found)} in {field}")
    kind = NUMBERS[tensor.datatype].kind
    values = np.array(found, dtype={"f": np.float64, "i": np.int64, "u": np.uint64}[kind])
    require_datatype(values, tensor)
    return values


def write_response(
    inference: Inference, request_id: str | None, parameters: Mapping[str, Any], rows: Sequence[RowAnswer]
) -> pb.ModelInferResponse:
    """The answer: `parameters` and the wanted outputs of `rows`, all of them binary or none."""
    served = inference.call.served
    response = pb.ModelInferResponse(model_name=served.name, model_version=str(served.version), id=request_id or "")
    for name, value in parameters.items():
        response.parameters[name].MergeFrom(_parameter(value))
    for output, binary in inference.wanted:
        described, part = describe_output(output, rows, served.manifest, binary=binary)
        tensor = response.outputs.add(name=output.name, datatype=output.datatype, shape=described["shape"])
        if binary:
            response.raw_output_contents.append(part)
        else:
            data = described["data"]
            values = [text.encode() for text in data] if output.datatype == "BYTES" else data
            getattr(tensor.contents, _CONTENTS[output.datatype]).extend(values)
    return response


def _parameter(value: Any) -> pb.InferParameter:
    if isinstance(value, bool):  # which is an int, too
        return pb.InferParameter(bool_param=value)
    if isinstance(value, int):
        return pb.InferParameter(int64_param=value)
    return pb.InferParameter(double_param=value) if isinstance(value, float) else pb.InferParameter(string_param=value)
