"""requests.parquet: the table of requests in Parquet, written a part at a time, and its reading.

It has the columns of requests.csv, times in seconds (float64), empty where the cell of the CSV file is; texts are
dictionaries. Seconds are exact to the microsecond, so that reading gives the whole microseconds back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maveriq.domain.records import NOT_YET, REQUEST_COLUMNS, RequestTable, RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.errors import InputError
from maveriq.files import open_regular_file
from maveriq.report.requests_csv import filled_bits, is_filled, numeric_columns
from maveriq.units import MICROS_PER_SECOND

if TYPE_CHECKING:
    import pyarrow as pa

Array: TypeAlias = npt.NDArray[Any]

FILE = "requests.parquet"
_ROWS_AT_ONCE = 1 << 18
_TYPES = {"request_id": "int64", "deployment_id": "int32", "endpoint": "int32", "slo_met": "bool"}
_COUNT = "int32"
_COMPRESSION = "snappy"  # zstd needs half the space and three times the time


def write_requests(path: Path, run: RunRecord) -> None:
    """Write the requests of a run."""
    import pyarrow as pa
    from pyarrow import parquet

    texts = {
        "model": _Texts(run.models),
        "status": _Texts({status.value: status.label for status in RequestStatus}),
        "reason": _Texts(dict(enumerate(run.requests.reasons))),
    }
    schema = pa.schema([(name, texts[name].type if name in texts else _type(name)) for name in REQUEST_COLUMNS])
    with parquet.ParquetWriter(
        path, schema, compression=_COMPRESSION, use_dictionary=list(texts), write_statistics=False
    ) as writer:
        for start in range(0, len(run.requests), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            writer.write_batch(pa.record_batch(_columns(run.requests, rows, texts), schema=schema))


def _type(name: str) -> pa.DataType:
    import pyarrow as pa

    return pa.float64() if name.endswith("_s") else pa.type_for_alias(_TYPES.get(name, _COUNT))


class _Texts:
    """A column of texts, made from numbers."""

    def __init__(self, text_of: dict[int, str]) -> None:
        import pyarrow as pa

        self.type = pa.dictionary(pa.int32(), pa.string())
        numbers = sorted({*text_of})
        self._texts = pa.array(["", *(text_of[number] for number in numbers)])
        self._index = np.zeros(1 + max([0, *numbers]), dtype=np.int32)
        self._index[numbers] = np.arange(1, 1 + len(numbers))

    def column(self, numbers: Array) -> pa.Array:
        """Return the text of each number, "" for one without text."""
        import pyarrow as pa

        known = np.where(numbers < len(self._index), numbers, 0)
        return pa.DictionaryArray.from_arrays(pa.array(self._index[known]), self._texts)


def _columns(table: RequestTable, rows: slice, texts: dict[str, _Texts]) -> list[pa.Array]:
    import pyarrow as pa

    values = numeric_columns(table, rows)
    bits = filled_bits(values)
    numbers = {"model": table.endpoint_id[rows], "status": table.status[rows], "reason": table.reason[rows]}
    columns = []
    for name in REQUEST_COLUMNS:
        if name in texts:
            columns.append(texts[name].column(numbers[name]))
            continue
        column = values[name] / MICROS_PER_SECOND if name.endswith("_s") else values[name]
        filled = is_filled(name, bits)
        columns.append(pa.array(column, type=_type(name), mask=None if filled.all() else ~filled))
    return columns


_READ_TIMES = {
    "arrival_s": NOT_YET, "start_s": NOT_YET, "first_token_s": NOT_YET, "finish_s": NOT_YET, "slo_s": 0,
}  # fmt: skip
_READ_COUNTS = {
    "request_id": None, "endpoint": None, "deployment_id": 0, "prompt_tokens": None, "cached_tokens": None,
    "output_tokens": None, "preemptions": None, "steps": 0,
}  # fmt: skip
"""The columns that are read, and what an empty cell stands for; None where there may be none."""

_MAX_S = 9e9  # 285 years; the microseconds of any shorter time are exact in a float


def read_requests(path: Path, numbers_of_texts: Mapping[str, Mapping[str, int]]) -> dict[str, Array]:
    """Return the columns of a table that the others follow from, by their names: whole numbers, times in microseconds.

    Args:
        path: the file.
        numbers_of_texts: for each column of texts, the number of each known text.

    Raises:
        InputError: it is missing, or not as maveriq writes it.
    """
    import pyarrow as pa
    from pyarrow import parquet

    where = f"requests {str(path)!r}"
    names = [*_READ_TIMES, *_READ_COUNTS, *numbers_of_texts]
    try:
        with open_regular_file(path, what="run file") as file:
            table = parquet.read_table(pa.PythonFile(file), columns=names)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{where}: {str(error).splitlines()[0]}; copy the run again") from None
    if missing := [name for name in names if name not in table.column_names]:
        raise InputError(f"{where} has no column {missing[0]}; copy the run again")
    try:
        return {
            **{name: _micros(table[name], empty) for name, empty in _READ_TIMES.items()},
            **{name: _whole(table[name], empty) for name, empty in _READ_COUNTS.items()},
            **{name: _numbers(table[name], numbers) for name, numbers in numbers_of_texts.items()},
        }
    except (ValueError, pa.ArrowException) as error:
        raise InputError(f"{where} is not what maveriq writes: {error}; copy the run again") from None


def _micros(column: pa.ChunkedArray, empty: int) -> Array:
    seconds: Array = column.cast("float64").to_numpy()  # NaN where a cell is empty
    is_empty = column.is_null().to_numpy()
    if not (is_empty | ((seconds >= 0) & (seconds <= _MAX_S))).all():
        raise ValueError("a time is out of range")
    return np.where(is_empty, empty, np.rint(np.where(is_empty, 0.0, seconds) * MICROS_PER_SECOND)).astype(np.int64)


def _whole(column: pa.ChunkedArray, empty: int | None) -> Array:
    if column.null_count and empty is None:
        raise ValueError("a cell is empty")
    values: Array = column.cast("int64").fill_null(0 if empty is None else empty).to_numpy()
    if (values < 0).any():
        raise ValueError("a number is negative")
    return values


def _numbers(column: pa.ChunkedArray, numbers: Mapping[str, int]) -> Array:
    import pyarrow as pa

    if not pa.types.is_dictionary(column.type) or column.null_count:
        raise ValueError("a column of texts is no dictionary")
    found = np.zeros(len(column), dtype=np.int64)
    start = 0
    for chunk in column.chunks:
        known = np.array([numbers.get(text, -1) for text in chunk.dictionary.to_pylist()], dtype=np.int64)
        found[start : start + len(chunk)] = known[chunk.indices.to_numpy()]
        start += len(chunk)
    if (found < 0).any():
        raise ValueError("run.json does not know a text in it")
    return found
