"""Tables of numbers, Parquet or CSV: every column is a feature but the one of classes. Needs pyarrow (the extra `data`)."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from training.data_config import TableConfig
from training.dataset import DataError, Dataset, DataSpec, measure_normalisation
from training.splits import Rows, load_splits

if TYPE_CHECKING:
    import pyarrow as pa

_ROW_NUMBERS = re.compile(r"(__index_level_\d+__)?")
"""Names of columns in which pandas writes its index, to Parquet and, without a name, to CSV."""


def load_table(config: TableConfig) -> Dataset:
    """Read a table and split it. The features are in the order of the file's columns; the model standardises them.

    Raises:
        DataError: a file cannot be read, a column is not there, or a value is missing or no number; the message names the
            column and the row, of which the first is 1.
    """
    table = _read(config.file)
    features = _features(table, config)

    def read(file: Path) -> Rows:
        rows = table if file == config.file else _read(file)
        x = np.stack([_numbers(rows, name, file) for name in features], axis=1)
        return x, _classes(rows, config.target, file)

    splits, labels = load_splits(read, config.file, config)
    spec = DataSpec(
        description=f"table {config.file.name}",
        input_shape=(len(features),),
        labels=labels,
        normalisation=measure_normalisation(splits.train.x, by_first_axis=True),
        features=features,
    )
    return Dataset(*splits, spec=spec, source=config)


def _features(table: pa.Table, config: TableConfig) -> tuple[str, ...]:
    if unknown := sorted({config.target, *config.drop} - set(table.column_names)):
        raise DataError(
            f"{config.file} has no column {', '.join(map(repr, unknown))}, but {', '.join(map(repr, table.column_names))}"
        )
    features = tuple(name for name in table.column_names if name not in (config.target, *config.drop))
    if numbers := [name for name in features if _ROW_NUMBERS.fullmatch(name)]:
        raise DataError(
            f"{config.file}: column {numbers[0]!r} is the numbers of rows that pandas writes along, which no model should "
            "learn from: write the table with index=False, or name the column in data.drop"
        )
    if not features:
        raise DataError(f"{config.file}: expected columns of numbers beside {config.target!r}, got none")
    return features


def _read(file: Path) -> pa.Table:
    try:
        import pyarrow as pa
        from pyarrow import csv, parquet
    except ModuleNotFoundError as exc:
        raise DataError(f"reading the table {file} needs pyarrow: pip install 'hbll-anytime[data]'") from exc
    try:
        match file.suffix.lower():
            case ".parquet" | ".pq":
                table = parquet.read_table(file)
            case ".csv":
                table = csv.read_csv(file, convert_options=csv.ConvertOptions(strings_can_be_null=True))
            case other:
                raise DataError(f"{file}: expected a .parquet or .csv file, got {other or 'no suffix'}")
        names = table.column_names
    except UnicodeDecodeError as exc:
        raise DataError(f"cannot read the table {file}: expected UTF-8, got names of columns in something else") from exc
    except (OSError, pa.ArrowException) as exc:
        raise DataError(f"cannot read the table {file}: {exc}") from exc
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{file} has several columns {', '.join(map(repr, twice))}: give each a name of its own")
    return table


def _column(table: pa.Table, name: str, file: Path) -> pa.ChunkedArray:
    """A column without missing values."""
    if name not in table.column_names:
        raise DataError(f"{file} has no column {name!r}; it has {', '.join(map(repr, table.column_names))}")
    column = table.column(name)
    if column.null_count:
        row = column.is_null().to_pylist().index(True) + 1
        raise DataError(f"{file}, column {name!r}, row {row}: a value is missing: fill it, or leave the row or column out")
    return column


def _numbers(table: pa.Table, name: str, file: Path) -> NDArray[np.float32]:
    """A feature, `(rows,) float32`."""
    from pyarrow import types

    column = _column(table, name, file)
    kind = column.type
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind)):
        row, value = next(
            ((n, v) for n, v in enumerate(column.to_pylist(), 1) if not _is_number(v)), (1, column[0].as_py())
        )
        raise DataError(
            f"{file}, column {name!r}, row {row}: expected a number, got {str(value)[:40]!r} ({kind}): encode the column "
            "as numbers, or leave it out with data.drop"
        )
    with np.errstate(over="ignore"):  # becomes infinity
        values: NDArray[np.float32] = column.to_numpy().astype(np.float32)
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values)))
        raise DataError(
            f"{file}, column {name!r}, row {row + 1}: expected a finite number, got {column[row].as_py()}: fill it, or "
            "leave the row or column out"
        )
    return values


def _classes(table: pa.Table, name: str, file: Path) -> NDArray[np.generic]:
    """The classes, `(rows,)` of whole numbers or text."""
    values: list[Any] = _column(table, name, file).to_pylist()
    if all(isinstance(value, (int, float)) for value in values):
        for row, value in enumerate(values, start=1):
            if not math.isfinite(value) or value != int(value):
                raise DataError(
                    f"{file}, column {name!r}, row {row}: expected a class, a whole number or text, got {value}: numbers "
                    "are not predicted here, only classes"
                )
        return np.array([value if isinstance(value, bool) else int(value) for value in values])
    return np.array([_text(value, row, name, file) for row, value in enumerate(values, start=1)])


def _text(value: Any, row: int, name: str, file: Path) -> str:
    """A class as text: pyarrow has bytes of a CSV column in which any value is no UTF-8, and of some Parquet files."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError as exc:
        raise DataError(
            f"{file}, column {name!r}, row {row}: expected text in UTF-8, got {value[:40]!r}: save the file as UTF-8"
        ) from exc


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
