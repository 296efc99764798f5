"""Rows of a table for a model that was trained on one: its columns are found by name. Needs pyarrow (the extra `data`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = {".csv", ".parquet", ".pq"}


class TableError(ValueError):
    """A table that a model cannot be asked about; the message names the file, and the column and row where there is one."""


def read_rows(file: Path, features: Sequence[str], drop: Collection[str] = ()) -> NDArray[np.float32]:
    """The rows of a table, `(rows, features) float32`: its columns in the order of `features`, whatever theirs is in the
    file, and without those to `drop`. Values are read as they are for training.

    Raises:
        TableError: the file cannot be read; it lacks columns or has others; a value is missing or no finite number.
    """
    table = _read(file)
    names = table.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TableError(f"{file} has several columns {_listed(twice)}: give each a name of its own")
    if absent := [name for name in drop if name not in names]:
        raise TableError(f"{file} has no column {_listed(absent)} to drop; it has {_listed(names)}")
    missing = [name for name in features if name not in names or name in drop]
    unknown = [name for name in names if name not in features and name not in drop]
    if missing or unknown:
        said = [f"it lacks {_listed(missing)}"] if missing else []
        said += [f"the model does not know {_listed(unknown)}, to be left out with --drop"] if unknown else []
        raise TableError(f"{file}: expected the columns that the model was trained on: {'; '.join(said)}")
    if not len(table):
        raise TableError(f"{file}: expected at least one row, got none")
    return np.stack([_numbers(table.column(name), f"{file}, column {name!r}") for name in features], axis=1)


def _read(file: Path) -> pa.Table:
    try:
        import pyarrow as pa
        from pyarrow import csv, parquet
    except ModuleNotFoundError as exc:
        raise TableError(f"reading the table {file} needs pyarrow: pip install 'hbll-anytime[data]'") from exc
    try:
        if file.suffix.lower() == ".csv":
            table = csv.read_csv(file, convert_options=csv.ConvertOptions(strings_can_be_null=True))
        else:
            table = parquet.read_table(file)
        table.column_names  # noqa: B018  # which fails where they are no UTF-8
    except (OSError, UnicodeDecodeError, pa.ArrowException) as exc:
        raise TableError(f"cannot read the table {file}: {exc}") from exc
    return table


def _numbers(column: pa.ChunkedArray, where: str) -> NDArray[np.float32]:
    from pyarrow import types

    if column.null_count:
        raise TableError(f"{where}, row {column.is_null().to_pylist().index(True) + 1}: expected a number, got no value")
    kind = column.type
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind)):
        row, value = next(
            ((n, v) for n, v in enumerate(column.to_pylist(), 1) if not _is_number(v)), (1, column[0].as_py())
        )
        raise TableError(f"{where}, row {row}: expected a number, got {str(value)[:40]!r} ({kind})")
    with np.errstate(over="ignore"):  # becomes infinity
        values: NDArray[np.float32] = column.to_numpy().astype(np.float32)
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values)))
        raise TableError(f"{where}, row {row + 1}: expected a finite number, got {column[row].as_py()}")
    return values


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _listed(names: Collection[str]) -> str:
    return ", ".join(map(repr, names))
