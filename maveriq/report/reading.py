"""Reads run folders back, strictly: what is missing or does not fit together is refused with its place.

requests.csv and gpus.csv are read by pyarrow, column by column. Where anything in a file is not as
maveriq writes it, the file is read again row by row: that is slower but names the line, the column
and the value. Times never pass through floats: pyarrow parses them as decimals of six places, which
are whole microseconds.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from maveriq.domain.decoder import part_of
from maveriq.domain.records import (
    ENGINE_COLUMNS,
    GPU_COLUMNS,
    ITL_COLUMNS,
    NOT_YET,
    REQUEST_COLUMNS,
    DeploymentRecord,
    EngineTable,
    GpuSample,
    ItlTable,
    RequestTable,
    RunRecord,
)
from maveriq.domain.requests import FINAL_STATUSES
from maveriq.errors import InputError
from maveriq.files import exists, open_regular_file
from maveriq.input_files import read_text
from maveriq.report import requests_parquet
from maveriq.tables import Row, read_csv, readable_error
from maveriq.text import unprotect_cell
from maveriq.units import BYTES_PER_GIB, MICROS_PER_SECOND, Micros, bytes_from_gib, micros

if TYPE_CHECKING:
    import pyarrow as pa

Array: TypeAlias = npt.NDArray[Any]

T = TypeVar("T")

_TIMES = {"arrival_us": "arrival_s", "start_us": "start_s", "first_token_us": "first_token_s", "finish_us": "finish_s"}
_COUNTS = ("request_id", "endpoint", "prompt_tokens", "cached_tokens", "output_tokens", "preemptions")
_EMPTY_IF_0 = ("deployment_id", "steps")
_LATER = ("steps",)
"""The last columns of requests.csv, which runs of earlier versions lack; their values are 0 then."""

_COLUMNS_BEFORE = REQUEST_COLUMNS[: -len(_LATER)]
_MAX_COUNT = 10**15 - 1
_MAX_HEADER_BYTES = 1 << 16
_MAX_TABLE_BYTES = 1 << 36
_MAX_S = 9e9  # 285 years; the microseconds of any shorter time are exact in a float


class _Rows(msgspec.Struct, forbid_unknown_fields=True):
    requests: int
    gpus: int
    engines: int | None = None
    itl: int | None = None


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    """What run.json keeps under "record"."""

    ended_us: Micros
    rows: _Rows
    models: dict[int, str]
    reasons: tuple[str, ...]
    deployments: tuple[DeploymentRecord, ...]


class _RunFile(msgspec.Struct):
    record: _Record


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    The request table comes back exactly, GPU memory to the KiB, engines over time to six decimals.

    Raises:
        InputError: a file is missing, is not as maveriq writes it, or does not belong to the others.
    """
    record = _decode(folder / "run.json", _RunFile).record
    return RunRecord(
        requests=_read_requests(folder, record),
        deployments=record.deployments,
        gpu_samples=tuple(_read_samples(folder / "gpus.csv", record)),
        models=record.models,
        ended_us=record.ended_us,
        engines=_read_engines(folder / "engines.csv", record.rows.engines),
        itl=_read_itl(folder / "itl.csv", record.rows.itl),
    )


def read_meta(folder: Path) -> dict[str, Any]:
    """Return run.json without its record: resolved configuration, seed, versions, summary.

    Raises:
        InputError: the file is missing or is not JSON.
    """
    content = _decode(folder / "run.json", dict[str, Any])
    return {key: value for key, value in content.items() if key != "record"}


def _decode(path: Path, shape: type[T]) -> T:
    text = read_text(path, what="run file")
    try:
        return msgspec.json.decode(text, type=shape, dec_hook=part_of)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise InputError(f"run file {str(path)!r} is not what maveriq writes: {readable_error(str(error))}") from None


def _read_rows(
    path: Path, columns: tuple[str, ...], *, what: str, expected: int, optional: tuple[str, ...] = ()
) -> Iterator[Row]:
    if not expected:  # `read_csv` refuses a table without rows
        return
    count = 0
    rows = read_csv(path, columns, what=what, optional=optional, max_bytes=_MAX_TABLE_BYTES)
    for count, row in enumerate(rows, start=1):  # noqa: B007 - counts
        yield row
    if count != expected:
        raise InputError(f"{what} {str(path)!r} has {count:,} rows where run.json says {expected:,}; copy it again")


def _read_requests(folder: Path, record: _Record) -> RequestTable:
    lookup, path = _Lookup(record), folder / "requests.csv"
    if exists(folder / requests_parquet.FILE):
        columns = requests_parquet.read_requests(folder / requests_parquet.FILE, lookup.texts)
        rows, expected = len(columns["request_id"]), record.rows.requests
        if rows != expected:
            where = str(folder / requests_parquet.FILE)
            raise InputError(f"requests {where!r} has {rows:,} rows where run.json says {expected:,}; copy it again")
        return RequestTable(**lookup.columns(columns), reasons=record.reasons)
    read = _request_columns(path, lookup.texts) if record.rows.requests else None
    if read is not None and len(read["request_id"]) == record.rows.requests:
        return RequestTable(**lookup.columns(read), reasons=record.reasons)
    return _read_row_by_row(path, record, lookup)


def _request_columns(path: Path, texts: Mapping[str, Mapping[str, int]]) -> dict[str, Array] | None:
    """Return the columns of requests.csv as int64, or None if anything is not as maveriq writes it.

    Times are in microseconds; an empty `deployment_id`, `steps` or `slo_s` is 0.

    Args:
        path: the file.
        texts: for each column of texts, the number of each known text.
    """
    for columns in (REQUEST_COLUMNS, _COLUMNS_BEFORE):
        times, empty_if_0 = _TIMES.values(), [name for name in _EMPTY_IF_0 if name in columns]
        table = _arrow_table(
            path, columns, times=(*times, "slo_s"), counts=(*_COUNTS, *empty_if_0), texts=tuple(texts)
        )  # fmt: skip
        if table is None:
            continue
        try:
            return {
                **{name: np.zeros(len(table), dtype=np.int64) for name in _LATER},
                **{name: _whole_numbers(table[name]) for name in _COUNTS},
                **{name: _whole_numbers(table[name], minimum=1, empty=0) for name in empty_if_0},
                **{name: _micros(table[name], empty=NOT_YET) for name in times},
                "slo_s": _micros(table["slo_s"], empty=0),
                **{name: _numbers_of_texts(table[name], numbers) for name, numbers in texts.items()},
            }
        except (ValueError, KeyError):
            return None
    return None


def _arrow_table(
    path: Path,
    columns: tuple[str, ...],
    *,
    times: Iterable[str] = (),
    counts: Iterable[str] = (),
    numbers: Iterable[str] = (),
    texts: Iterable[str] = (),
) -> pa.Table | None:
    """Return the named columns of a CSV file, or None if it has another header or a cell of another type."""
    import pyarrow as pa
    from pyarrow import csv

    types = {
        **dict.fromkeys(times, pa.decimal128(16, 6)),
        **dict.fromkeys(counts, pa.string()),
        **dict.fromkeys(numbers, pa.float64()),
        **dict.fromkeys(texts, pa.dictionary(pa.int32(), pa.string())),
    }
    try:
        with io.BufferedReader(open_regular_file(path, what="run file")) as file:
            header = file.readline(_MAX_HEADER_BYTES).removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
            if header != ",".join(columns).encode():
                return None
            file.seek(0)
            return csv.read_csv(
                file,
                parse_options=csv.ParseOptions(newlines_in_values=True),
                convert_options=csv.ConvertOptions(
                    column_types=types, include_columns=list(types), null_values=[""], strings_can_be_null=False
                ),
            )
    except (OSError, pa.ArrowInvalid):
        return None


def _whole_numbers(column: pa.ChunkedArray, *, minimum: int = 0, empty: int | None = None) -> Array:
    """Return a column of texts as whole numbers; `empty` stands for an empty cell.

    Raises:
        ValueError: a cell is not a whole number of digits alone, is out of range, or is empty and may not be.
    """
    from pyarrow import compute

    # As texts, because pyarrow's integers may be written with spaces or as 0x1.
    is_empty: Array = compute.equal(column, "").to_numpy()
    if empty is not None:
        column = compute.replace_with_mask(column.combine_chunks(), is_empty, str(minimum))
    if not compute.all(compute.ascii_is_decimal(column)).as_py():
        raise ValueError("not a whole number")
    values: Array = column.cast("int64").to_numpy()
    if not ((values >= minimum) & (values <= _MAX_COUNT)).all():
        raise ValueError("number out of range")
    return values if empty is None else np.where(is_empty, empty, values)


def _micros(column: pa.ChunkedArray, *, empty: int) -> Array:
    """Return a column of decimals with six places as whole microseconds; `empty` stands for an empty cell.

    Raises:
        ValueError: a time is out of range.
    """
    # A decimal is stored as its number of microseconds in 16 bytes; the lower 8 hold all numbers in range.
    low = [
        np.frombuffer(chunk.buffers()[1], np.int64)[2 * chunk.offset : 2 * (chunk.offset + len(chunk)) : 2]
        for chunk in column.chunks
    ]
    is_empty: Array = column.is_null().to_numpy()
    values: Array = np.where(is_empty, 0, np.concatenate(low))
    if not ((values >= 0) & (values <= _MAX_S * MICROS_PER_SECOND)).all():
        raise ValueError("time out of range")
    return np.where(is_empty, empty, values)


def _numbers_of_texts(column: pa.ChunkedArray, numbers: Mapping[str, int]) -> Array:
    """Return the number of the text in each cell.

    Raises:
        KeyError: a text has no number.
    """
    return np.concatenate(
        [
            np.array([numbers[unprotect_cell(cell)] for cell in chunk.dictionary.to_pylist()], dtype=np.int64)[
                chunk.indices.to_numpy()
            ]
            for chunk in column.chunks
        ]
    )


def _read_row_by_row(path: Path, record: _Record, lookup: _Lookup) -> RequestTable:
    names = [name for name in RequestTable.__slots__ if name != "reasons"]
    columns = {name: array("q") for name in names}
    rows = _read_rows(path, _COLUMNS_BEFORE, what="requests", expected=record.rows.requests, optional=_LATER)
    for row in rows:
        for name, value in lookup.values(row).items():
            columns[name].append(value)
    return RequestTable(
        **{name: np.frombuffer(values, dtype=np.int64) if values else np.zeros(0, dtype=np.int64)
           for name, values in columns.items()},
        reasons=record.reasons,
    )  # fmt: skip


class _Lookup:
    """Maps the texts of requests.csv to numbers, and its columns to those of the request table."""

    def __init__(self, record: _Record) -> None:
        self._endpoint_of_model: dict[str, int] = {}
        for endpoint_id, model in sorted(record.models.items()):
            self._endpoint_of_model.setdefault(model, endpoint_id)
        self._statuses = {status.label: status.value for status in FINAL_STATUSES}
        self._reasons = {reason: index for index, reason in reversed(list(enumerate(record.reasons)))}

    @property
    def texts(self) -> dict[str, dict[str, int]]:
        """The number of each text, by column; the number of a model is its first endpoint."""
        return {"model": self._endpoint_of_model, "status": self._statuses, "reason": {**self._reasons, "": 0}}

    def columns(self, read: dict[str, Array]) -> dict[str, Array]:
        """Return the columns of the request table from those of the file."""
        return {
            "request_id": read["request_id"],
            "endpoint_id": read["endpoint"],
            "deployment_id": read["deployment_id"],
            **{name: read[column] for name, column in _TIMES.items()},
            "status": read["status"],
            "reason": read["reason"],
            "prompt_tokens": read["prompt_tokens"],
            "cached_tokens": read["cached_tokens"],
            "output_tokens": read["output_tokens"],
            "preemptions": read["preemptions"],
            "steps": read["steps"],
            "slo_us": read["slo_s"],
        }

    def values(self, row: Row) -> dict[str, int]:
        """Return the values of one row of the request table; `columns` does the same for all rows.

        Raises:
            InputError: a cell is not as maveriq writes it.
        """
        self._known(row, "model", self._endpoint_of_model)
        return {
            "request_id": row.count("request_id"),
            "endpoint_id": row.count("endpoint"),
            "deployment_id": row.count("deployment_id", minimum=1) if row.cells["deployment_id"] else 0,
            **{name: _time_us(row, column, NOT_YET) for name, column in _TIMES.items()},
            "status": self._known(row, "status", self._statuses),
            "reason": self._known(row, "reason", self._reasons) if row.cells["reason"] else 0,
            "prompt_tokens": row.count("prompt_tokens"),
            "cached_tokens": row.count("cached_tokens"),
            "output_tokens": row.count("output_tokens"),
            "preemptions": row.count("preemptions"),
            "steps": row.count("steps", minimum=1) if row.cells.get("steps") else 0,
            "slo_us": _time_us(row, "slo_s", 0),
        }

    @staticmethod
    def _known(row: Row, column: str, known: dict[str, int]) -> int:
        try:
            return known[row.cells[column]]
        except KeyError:
            raise InputError(f"{row.where}: run.json knows no {column} {row.cells[column]!r}") from None


def _time_us(row: Row, column: str, absent: int) -> Micros:
    return micros(row.number(column, minimum=0, maximum=_MAX_S)) if row.cells[column] else absent


def _read_samples(path: Path, record: _Record) -> Iterator[GpuSample]:
    columns = _sample_columns(path) if record.rows.gpus else None
    if columns is not None and len(columns[0]) == record.rows.gpus:
        for time_us, gpu_id, memory_bytes, busy_share in zip(*(part.tolist() for part in columns), strict=True):
            yield GpuSample(time_us=time_us, gpu_id=gpu_id, memory_bytes=memory_bytes, busy_share=busy_share)
        return
    for row in _read_rows(path, GPU_COLUMNS, what="GPU samples", expected=record.rows.gpus):
        yield GpuSample(
            time_us=_time_us(row, "time_s", 0),
            gpu_id=row.count("gpu"),
            memory_bytes=bytes_from_gib(row.number("memory_gib", minimum=0)),
            busy_share=row.number("busy_share", minimum=0),
        )


def _sample_columns(path: Path) -> tuple[Array, Array, Array, Array] | None:
    """Return times in microseconds, GPUs, bytes and busy shares; None if anything is not as maveriq writes it."""
    table = _arrow_table(path, GPU_COLUMNS, times=["time_s"], counts=["gpu"], numbers=["memory_gib", "busy_share"])
    if table is None:
        return None
    try:
        memory_gib, busy_share = (_finite_numbers(table[name]) for name in ("memory_gib", "busy_share"))
        memory_bytes = np.rint(memory_gib * BYTES_PER_GIB).astype(np.int64)
        return _micros(table["time_s"], empty=0), _whole_numbers(table["gpu"]), memory_bytes, busy_share
    except ValueError:
        return None


def _finite_numbers(column: pa.ChunkedArray, *, may_be_empty: bool = False) -> Array:
    """Return a column of numbers from zero; an empty cell is NaN.

    Raises:
        ValueError: a number is out of range, or a cell is empty and may not be.
    """
    values: Array = column.to_numpy()
    allowed = (values >= 0) & (values < _MAX_COUNT)
    if may_be_empty:
        allowed |= column.is_null().to_numpy()
    if not allowed.all():
        raise ValueError("number out of range")
    return values


_SHARES_AND_COUNTS = ("running", "waiting", "kv_use", "batch_tokens", "busy_share")
_EMPTY_IF_IDLE = ("batch_tokens", "step_s")


def _read_engines(path: Path, expected: int | None) -> EngineTable | None:
    """Return engines.csv; None for a run that has none."""
    if expected is None:
        return None
    columns = _engine_columns(path) if expected else None
    if columns is None or len(columns["time_us"]) != expected:
        rows = list(_read_rows(path, ENGINE_COLUMNS, what="engines", expected=expected))
        columns = {
            "time_us": np.array([_time_us(row, "time_s", 0) for row in rows], dtype=np.int64),
            "deployment_id": np.array([row.count("deployment_id", minimum=1) for row in rows], dtype=np.int64),
            **{name: np.array([_number(row, name) for row in rows], dtype=np.float64) for name in _SHARES_AND_COUNTS},
            "step_us": np.array([_number(row, "step_s") * MICROS_PER_SECOND for row in rows], dtype=np.float64),
        }
    return EngineTable(**columns)


def _number(row: Row, column: str) -> float:
    if column in _EMPTY_IF_IDLE and not row.cells[column]:
        return float("nan")
    return row.number(column, minimum=0)


def _engine_columns(path: Path) -> dict[str, Array] | None:
    """Return the columns of engines.csv, or None if anything is not as maveriq writes it."""
    table = _arrow_table(
        path, ENGINE_COLUMNS, times=["time_s"], counts=["deployment_id"], numbers=[*_SHARES_AND_COUNTS, "step_s"]
    )
    if table is None:
        return None
    try:
        numbers = {
            name: _finite_numbers(table[name], may_be_empty=name in _EMPTY_IF_IDLE)
            for name in (*_SHARES_AND_COUNTS, "step_s")
        }
        step_us = numbers.pop("step_s") * MICROS_PER_SECOND
        deployment_id = _whole_numbers(table["deployment_id"], minimum=1)
        return {
            "time_us": _micros(table["time_s"], empty=0), "deployment_id": deployment_id, "step_us": step_us, **numbers,
        }  # fmt: skip
    except ValueError:
        return None


def _read_itl(path: Path, expected: int | None) -> ItlTable | None:
    """Return itl.csv; None for a run that has none."""
    if expected is None:
        return None
    table = _arrow_table(path, ITL_COLUMNS, times=["itl_s"], counts=["endpoint", "tokens"]) if expected else None
    if table is not None and len(table) == expected:
        try:
            return ItlTable(
                endpoint_id=_whole_numbers(table["endpoint"], minimum=1),
                itl_us=_micros(table["itl_s"], empty=NOT_YET),
                tokens=_whole_numbers(table["tokens"], minimum=1),
            )
        except ValueError:
            pass  # read row by row, its place is found
    rows = list(_read_rows(path, ITL_COLUMNS, what="inter-token latencies", expected=expected))
    return ItlTable(
        endpoint_id=np.array([row.count("endpoint", minimum=1) for row in rows], dtype=np.int64),
        itl_us=np.array([_time_us(row, "itl_s", NOT_YET) for row in rows], dtype=np.int64),
        tokens=np.array([row.count("tokens", minimum=1) for row in rows], dtype=np.int64),
    )
