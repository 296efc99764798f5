"""Tensors of the protocol -> rows for the engine, and the engine's answers -> tensors."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from family.manifest import Manifest
from family.tree import format_path
from service.answers import RowAnswer
from service.errors import BadRequest
from service.inputs import check_rows
from service.oip.schemas import RequestInput, RequestOutput
from service.runtime import Rows

NUMBERS: dict[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {
        "FP16": "<f2",
        "FP32": "<f4",
        "FP64": "<f8",
        "INT8": "i1",
        "INT16": "<i2",
        "INT32": "<i4",
        "INT64": "<i8",
        "UINT8": "u1",
        "UINT16": "<u2",
        "UINT32": "<u4",
        "UINT64": "<u8",
    }.items()
}

Values = NDArray[Any] | list[str]


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that can be asked for: `values(rows, manifest)` is an array `(rows, *row_shape)`, little-endian, or a string
    per row."""

    name: str
    datatype: str
    per_class: bool
    values: Callable[[Sequence[RowAnswer], Manifest], Values]

    def shape(self, rows: int, manifest: Manifest) -> list[int]:
        """Its shape for so many rows; -1 for any number of them."""
        return [rows, len(manifest.labels)] if self.per_class else [rows]


OUTPUTS: Mapping[str, Output] = {
    output.name: output
    for output in (
        Output("probabilities", "FP32", True, lambda rows, _: np.array([row.probabilities for row in rows], "<f4")),
        Output("logits", "FP32", True, lambda rows, _: np.array([row.logits for row in rows], "<f4")),
        Output("label", "BYTES", False, lambda rows, manifest: [manifest.labels[row.label] for row in rows]),
        Output("confidence", "FP32", False, lambda rows, _: np.array([row.confidence for row in rows], "<f4")),
        Output("depth", "INT64", False, lambda rows, _: np.array([len(row.path) for row in rows], "<i8")),
        Output("path", "BYTES", False, lambda rows, _: [format_path(row.path) for row in rows]),
        Output("stopped_by", "BYTES", False, lambda rows, _: [row.stopped_by or "" for row in rows]),
    )
}


def require_input(inputs: Sequence[RequestInput], manifest: Manifest, max_rows: int) -> RequestInput:
    """The one input that the model has, its name, datatype and shape checked.

    Raises:
        BadRequest: it is missing, there are others, or it is another tensor than the model takes.
    """
    spec = manifest.input
    if len(inputs) != 1 or inputs[0].name != spec.name:
        got = ", ".join(repr(tensor.name[:40]) for tensor in inputs[:5]) or "none"
        raise BadRequest(f"inputs: expected the one input {spec.name!r}, got {got}")
    (tensor,) = inputs
    if tensor.datatype not in NUMBERS or (spec.datatype == "INT64" and NUMBERS[tensor.datatype].kind not in "iu"):
        raise BadRequest(f"input {spec.name!r}: expected datatype {spec.datatype}, got {tensor.datatype[:40]!r}")
    if len(tensor.shape) != len(spec.shape) or tensor.shape[1:] != list(spec.shape[1:]):
        raise BadRequest(f"input {spec.name!r}: expected shape {list(spec.shape)}, got {str(tensor.shape[:9])[:80]}")
    if not 1 <= tensor.shape[0] <= max_rows:
        raise BadRequest(f"input {spec.name!r}: expected 1 to {max_rows} rows, got {str(tensor.shape[0])[:40]}")
    return tensor


def read_values(tensor: RequestInput, binary: memoryview) -> NDArray[Any]:
    """The values of a checked input of a body, in any shape of so many: a view of `binary` where they are in it.

    Raises:
        BadRequest: there are more or fewer than the shape says, or values that are none of the datatype.
    """
    if "binary_data_size" in tensor.parameters:
        return _from_binary(tensor, binary)
    if len(binary):
        raise BadRequest(f"expected the body to end with the JSON, got {len(binary)} bytes that no input claims")
    return _from_json(tensor)


def raw_values(tensor: RequestInput, raw: bytes, where: str) -> NDArray[Any]:
    """The values of a checked input that are all that is in `raw`, little-endian and flat; `where` names it.

    Raises:
        BadRequest: it is longer or shorter than the shape says.
    """
    dtype = NUMBERS[tensor.datatype]
    expected = dtype.itemsize * math.prod(tensor.shape)
    if len(raw) != expected:
        wanted = f"{expected} bytes for {tensor.datatype} of shape {tensor.shape}"
        raise BadRequest(f"input {tensor.name!r}: expected {where} of {wanted}, got {len(raw)}")
    return np.frombuffer(raw, dtype)


def as_rows(values: NDArray[Any], tensor: RequestInput, manifest: Manifest) -> Rows:
    """The values of a checked input as `x (rows, *input_shape)`, a view of them where that is possible.

    Raises:
        InvalidInput: NaN, infinity, pixels or tokens out of range among them.
    """
    with np.errstate(over="ignore"):  # becomes infinity, which is refused
        # The length of the JSON before a binary tensor may misalign it.
        x: Rows = np.require(values.reshape(tensor.shape), manifest.input.code, ["C", "A"])
    check_rows(x, tensor.name, manifest)
    return x


def require_datatype(values: NDArray[Any], tensor: RequestInput) -> None:
    """Refuse numbers that an input of integers cannot hold.

    Raises:
        BadRequest: there are some.
    """
    dtype = NUMBERS[tensor.datatype]
    if dtype.kind not in "iu":
        return
    with np.errstate(invalid="ignore"):
        whole = values.astype(dtype)
    if not np.array_equal(whole, values):
        raise BadRequest(f"input {tensor.name!r}: expected {tensor.datatype} values, got others among them")


def _from_binary(tensor: RequestInput, binary: memoryview) -> NDArray[Any]:
    dtype = NUMBERS[tensor.datatype]
    size, expected = tensor.parameters["binary_data_size"], dtype.itemsize * math.prod(tensor.shape)
    if tensor.data is not None:
        raise BadRequest(f"input {tensor.name!r}: expected either data or binary_data_size, got both")
    if type(size) is not int or size != expected:
        wanted = f"{expected} for {tensor.datatype} of shape {tensor.shape}"
        raise BadRequest(f"input {tensor.name!r}: expected binary_data_size {wanted}, got {str(size)[:40]!r}")
    if len(binary) != expected:
        raise BadRequest(f"input {tensor.name!r}: expected {expected} bytes after the JSON, got {len(binary)}")
    return np.frombuffer(binary, dtype)


def _from_json(tensor: RequestInput) -> NDArray[Any]:
    name, count = tensor.name, math.prod(tensor.shape)
    if tensor.data is None:
        raise BadRequest(f"input {name!r}: expected data or binary_data_size, got neither")
    if len(tensor.data) not in (count, tensor.shape[0]):  # before numpy walks whatever it is
        raise BadRequest(
            f"input {name!r}: expected {count} values, flat or nested to shape {tensor.shape}, got {len(tensor.data)}"
        )
    try:
        values = np.array(tensor.data)
    except (ValueError, OverflowError) as exc:
        raise BadRequest(f"input {name!r}: expected numbers, got lists of uneven lengths") from exc
    if values.shape not in ((count,), tuple(tensor.shape)):
        raise BadRequest(f"input {name!r}: expected data flat or of shape {tensor.shape}, got {list(values.shape)}")
    if values.dtype.kind not in "fiu":
        raise BadRequest(f"input {name!r}: expected numbers, got other values among them")
    require_datatype(values, tensor)
    return values


def require_outputs(asked: Sequence[RequestOutput], binary: bool) -> list[tuple[Output, bool]]:
    """The outputs that are asked for, all if none is named, each with whether it goes into the binary part; `binary`
    decides for those that do not say.

    Raises:
        BadRequest: an output is unknown, named twice, or wanted as we do not serve it.
    """
    if not asked:
        return [(output, binary) for output in OUTPUTS.values()]
    wanted: dict[str, tuple[Output, bool]] = {}
    for each in asked:
        if each.name not in OUTPUTS:
            raise BadRequest(f"outputs: expected some of {', '.join(OUTPUTS)}, got {each.name[:40]!r}")
        if each.name in wanted:
            raise BadRequest(f"outputs: expected each once, got {each.name!r} several times")
        if unserved := {"classification", "shared_memory_region"} & each.parameters.keys():
            raise BadRequest(f"output {each.name!r}: {', '.join(sorted(unserved))} is not served here")
        as_binary = each.parameters.get("binary_data", binary)
        if not isinstance(as_binary, bool):
            raise BadRequest(f"output {each.name!r}: expected binary_data to be a boolean, got {str(as_binary)[:40]!r}")
        wanted[each.name] = OUTPUTS[each.name], as_binary
    return list(wanted.values())


def describe_output(
    output: Output, rows: Sequence[RowAnswer], manifest: Manifest, *, binary: bool
) -> tuple[dict[str, Any], bytes]:
    """An output as an answer's JSON has it, and its bytes for the binary part: little-endian, strings each after its
    length in 4 bytes; none unless `binary`."""
    described: dict[str, Any] = {
        "name": output.name,
        "datatype": output.datatype,
        "shape": output.shape(len(rows), manifest),
    }
    values = output.values(rows, manifest)
    if not binary:
        described["data"] = values if isinstance(values, list) else values.ravel().tolist()
        return described, b""
    if isinstance(values, list):
        encoded = [value.encode() for value in values]
        part = b"".join(struct.pack("<I", len(each)) + each for each in encoded)
    else:
        part = values.tobytes()
    described["parameters"] = {"binary_data_size": len(part)}
    return described, part
