"""What callers have, as the bodies that the server reads.

Arrays alone go as they are (`application/octet-stream`, 4 bytes a number, 8 a token): that is the quickest to write and to
read, and its wishes go into the query. What has a picture in it, and every stream, goes as JSON with base64, because
pictures have no raw form: the server scales them to what the model takes, so they are sent as files, not as pixels.
"""

from __future__ import annotations

import base64
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hbll.client.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL import Image

Picture: TypeAlias = "bytes | str | os.PathLike[str] | Image.Image"
"""An image file's content or its path, or an image of PIL."""

Inputs: TypeAlias = "NDArray[Any] | Picture | Sequence[NDArray[Any] | Picture]"
"""One array, of one row or of a batch; one picture; or a sequence of rows, arrays and pictures mixed as they come."""

Row = NDArray[np.float32 | np.int64] | bytes
"""One row: an array of the model's input shape, little-endian, or the content of an image file."""

_PNG_MODES = {"1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"}


def holds_arrays(inputs: Inputs) -> bool:
    """Whether `rows_of` needs the model's input shape and datatype."""
    return any(isinstance(row, np.ndarray) for row in _as_rows(inputs))


def takes_long(inputs: Inputs) -> bool:
    """Whether `rows_of` has to read files or to encode pictures."""
    return not all(isinstance(row, np.ndarray | bytes) for row in _as_rows(inputs))


def rows_of(inputs: Inputs, shape: tuple[int, ...] | None, datatype: str = "FP32") -> list[Row]:
    """The rows of `inputs` for a model that takes `shape`, which may be none if there are no arrays, of numbers (FP32) or
    tokens (INT64). Reads files.

    Raises:
        InvalidRequest: there are none; an array has another shape or no numbers; a file cannot be read; something else.
    """
    if isinstance(inputs, np.ndarray) and inputs.shape != shape:
        if shape is None or inputs.shape[1:] != shape:
            expected = f"{_shown(shape)} or {_shown(('rows', *(shape or ())))}"
            raise InvalidRequest(f"inputs: expected shape {expected}, got {_shown(inputs.shape)}")
        inputs = list(inputs)
    rows = _as_rows(inputs)
    if not rows:
        raise InvalidRequest("inputs: expected at least one row, got none")
    return [_row(row, shape, datatype, f"inputs[{index}]") for index, row in enumerate(rows)]


def raw_body(rows: Sequence[Row]) -> bytes | None:
    """The rows one after another; none if there are pictures among them."""
    return b"".join(row.tobytes() for row in rows if isinstance(row, np.ndarray)) if _all_arrays(rows) else None


def json_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON."""
    return [
        {"image": base64.b64encode(row).decode()}
        if isinstance(row, bytes)
        else {
            "tensor": base64.b64encode(row.tobytes()).decode(),
            "datatype": "INT64" if row.dtype.kind == "i" else "FP32",
            "shape": list(row.shape),
        }
        for row in rows
    ]


def _all_arrays(rows: Sequence[Row]) -> bool:
    return all(isinstance(row, np.ndarray) for row in rows)


def _as_rows(inputs: Any) -> Sequence[Any]:
    return inputs if isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes) else [inputs]


def _row(row: Any, shape: tuple[int, ...] | None, datatype: str, where: str) -> Row:
    pil = sys.modules.get("PIL.Image")  # whoever has an image of PIL has imported it
    if isinstance(row, np.ndarray):
        tokens = datatype == "INT64"
        if row.dtype.kind not in ("iu" if tokens else "fiu"):
            wanted = "tokens, whole numbers" if tokens else "numbers"
            raise InvalidRequest(f"{where}: expected an array of {wanted}, got dtype {row.dtype}")
        if row.shape != shape:
            raise InvalidRequest(f"{where}: expected shape {_shown(shape)}, got {_shown(row.shape)}")
        with np.errstate(over="ignore"):  # becomes infinity, which the server refuses
            return np.ascontiguousarray(row, "<i8" if tokens else "<f4")
    if isinstance(row, bytes):
        return row
    if isinstance(row, str | os.PathLike):
        try:
            return Path(row).read_bytes()
        except (OSError, ValueError) as exc:
            raise InvalidRequest(f"{where}: {os.fspath(row)!r} cannot be read: {exc}") from exc
    if pil is not None and isinstance(row, pil.Image):
        content = io.BytesIO()
        (row if row.mode in _PNG_MODES else row.convert("RGB")).save(content, "PNG")
        return content.getvalue()
    raise InvalidRequest(
        f"{where}: expected a numpy array, an image of PIL, or an image file as bytes or path, got {type(row).__name__}"
    )


def _shown(shape: Sequence[object] | None) -> str:
    return f"({', '.join(map(str, shape or ()))})"
