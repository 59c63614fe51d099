"""requests.csv read fast, a chunk of rows at a time, where all in it is as maveriq writes it.

Anything else makes it give up; `reading` then goes row by row, which is slower but names the fault.

Reading a run folder back, strictly: what does not fit together is refused with its place.
"""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from maveriq.domain.records import (
    GPU_COLUMNS,
    NOT_YET,
    REQUEST_COLUMNS,
    DeploymentRecord,
    GpuSample,
    RequestTable,
    RunRecord,
)
from maveriq.domain.requests import FINAL_STATUSES
from maveriq.errors import InputError
from maveriq.tables import Row, in_plain_words, read_csv, read_text
from maveriq.units import MICROS_PER_SECOND, Micros, bytes_from_gib, micros

Array: TypeAlias = npt.NDArray[Any]

_ROWS_AT_ONCE = 256  # more at once are slower: they leave the processor's cache
_MAX_DIGITS = 15

# Beside these, `deployment_id` and `slo_s` may be empty and are then 0.
_COUNTS = ("request_id", "prompt_tokens", "output_tokens")
_TIME_COLUMNS = ("arrival_s", "start_s", "first_token_s", "finish_s")

LONGEST_S = 9e9
"""285 years: the microseconds of any shorter time are exact in a float."""


def read_columns(path: Path, texts: Mapping[str, Mapping[str, int]]) -> dict[str, Array] | None:
    """Return the columns of requests.csv as int64, times in microseconds; None where anything is unusual.

    Args:
        path: the file.
        texts: the number of each known text, for each column of texts.
    """
    found: dict[str, array[int]] = {
        name: array("q") for name in (*_COUNTS, *_TIME_COLUMNS, "deployment_id", "slo_s", *texts)
    }
    try:
        for cells in _chunks(path):
            for name in _COUNTS:
                found[name].frombytes(_counts(cells[name]).tobytes())
            if "0" in cells["deployment_id"]:  # none is said by an empty cell
                return None
            found["deployment_id"].frombytes(_counts([cell or "0" for cell in cells["deployment_id"]]).tobytes())
            for name, absent in (*((name, NOT_YET) for name in _TIME_COLUMNS), ("slo_s", 0)):
                found[name].frombytes(_micros(cells[name], absent).tobytes())
            for name, numbers in texts.items():
                found[name].extend(map(numbers.__getitem__, cells[name]))
    except (OSError, ValueError, KeyError, OverflowError, csv.Error):
        return None
    return {name: np.frombuffer(values, dtype=np.int64) for name, values in found.items() if values}


def _chunks(path: Path) -> Iterator[dict[str, Sequence[str]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        if tuple(next(rows, ())) != REQUEST_COLUMNS:
            raise ValueError("other columns")
        while chunk := list(islice(rows, _ROWS_AT_ONCE)):
            columns = list(zip(*chunk, strict=True))
            if len(columns) != len(REQUEST_COLUMNS):
                raise ValueError("other numbers of cells")
            yield dict(zip(REQUEST_COLUMNS, columns, strict=True))


def _counts(cells: Sequence[str]) -> Array:
    joined = "".join(cells)
    if (
        not (joined.isascii() and joined.isdigit())
        or not 0 < len(min(cells, key=len)) <= len(max(cells, key=len)) <= _MAX_DIGITS
    ):
        raise ValueError("not whole numbers")
    return np.fromiter(map(int, cells), dtype=np.int64, count=len(cells))


def _micros(cells: Sequence[str], absent: int) -> Array:
    """Return seconds as whole microseconds, `absent` where a cell is empty."""
    empty = np.fromiter((not cell for cell in cells), dtype=bool, count=len(cells))
    seconds = np.fromiter((float(cell or 0) for cell in cells), dtype=np.float64, count=len(cells))
    if not ((seconds >= 0) & (seconds <= LONGEST_S)).all():
        raise ValueError("not times")
    micros: Array = np.rint(seconds * MICROS_PER_SECOND).astype(np.int64)
    micros[empty] = absent
    return micros


T = TypeVar("T")

_TIMES = {"arrival_us": "arrival_s", "start_us": "start_s", "first_token_us": "first_token_s", "finish_us": "finish_s"}


class _Rows(msgspec.Struct, forbid_unknown_fields=True):
    requests: int
    gpus: int


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

    The request table comes back exactly, but for one thing: a request that no deployment took is
    given the first endpoint of its model. GPU memory comes back to the KiB.

    Raises:
        InputError: a file is missing, is not what it should be, or they do not belong together.
    """
    record = _decode(folder / "run.json", _RunFile).record
    return RunRecord(
        requests=_read_requests(folder / "requests.csv", record),
        deployments=record.deployments,
        gpu_samples=tuple(_read_samples(folder / "gpus.csv", record)),
        models=record.models,
        ended_us=record.ended_us,
    )


def read_meta(folder: Path) -> dict[str, Any]:
    """Return run.json but for its record: resolved configuration, seed, versions, summary.

    Raises:
        InputError: it is missing or is not JSON.
    """
    body = _decode(folder / "run.json", dict[str, Any])
    return {key: value for key, value in body.items() if key != "record"}


def _decode(path: Path, shape: type[T]) -> T:
    text = read_text(path, what="run file")
    try:
        return msgspec.json.decode(text, type=shape)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise InputError(f"run file {str(path)!r} is not what maveriq writes: {in_plain_words(str(error))}") from None


def _read_rows(path: Path, columns: tuple[str, ...], *, what: str, expected: int) -> Iterator[Row]:
    if not expected:  # a table with no row is no error here
        return
    count = 0
    for count, row in enumerate(read_csv(path, columns, what=what), start=1):  # noqa: B007 - counts
        yield row
    if count != expected:
        raise InputError(f"{what} {str(path)!r} has {count:,} rows where run.json says {expected:,}; copy it again")


def _read_requests(path: Path, record: _Record) -> RequestTable:
    lookup = _Lookup(record)
    fast = read_columns(path, lookup.texts) if record.rows.requests else None
    if fast is not None and len(fast["request_id"]) == record.rows.requests:
        return RequestTable(**lookup.columns(fast), reasons=record.reasons)
    return _read_row_by_row(path, record, lookup)


def _read_row_by_row(path: Path, record: _Record, lookup: _Lookup) -> RequestTable:
    names = [name for name in RequestTable.__slots__ if name != "reasons"]
    columns = {name: array("q") for name in names}
    for row in _read_rows(path, REQUEST_COLUMNS, what="requests", expected=record.rows.requests):
        for name, value in lookup.values(row).items():
            columns[name].append(value)
    return RequestTable(
        **{name: np.frombuffer(values, dtype=np.int64) if values else np.zeros(0, dtype=np.int64)
           for name, values in columns.items()},
        reasons=record.reasons,
    )  # fmt: skip


class _Lookup:
    """From the cells of requests.csv to the numbers of the table."""

    def __init__(self, record: _Record) -> None:
        self._endpoint_of_model: dict[str, int] = {}
        for endpoint_id, model in sorted(record.models.items()):
            self._endpoint_of_model.setdefault(model, endpoint_id)
        self._endpoint_of_deployment = {d.deployment_id: d.endpoint.endpoint_id for d in record.deployments}
        self._statuses = {status.label: status.value for status in FINAL_STATUSES}
        self._reasons = {reason: index for index, reason in reversed(list(enumerate(record.reasons)))}

    @property
    def texts(self) -> dict[str, dict[str, int]]:
        """The number of each text: of a model its first endpoint."""
        return {"model": self._endpoint_of_model, "status": self._statuses, "reason": {**self._reasons, "": 0}}

    def columns(self, read: dict[str, Array]) -> dict[str, Array]:
        """Return the columns of the table from those of the file; the same as `values` row by row."""
        deployments, which = np.unique(read["deployment_id"], return_inverse=True)
        of_deployment = [self._endpoint_of_deployment.get(one, 0) for one in deployments.tolist()]
        endpoint_id = np.array(of_deployment, dtype=np.int64)[which]
        return {
            "request_id": read["request_id"],
            "endpoint_id": np.where(endpoint_id > 0, endpoint_id, read["model"]),
            "deployment_id": read["deployment_id"],
            **{name: read[column] for name, column in _TIMES.items()},
            "status": read["status"],
            "reason": read["reason"],
            "prompt_tokens": read["prompt_tokens"],
            "output_tokens": read["output_tokens"],
            "slo_us": read["slo_s"],
        }

    def values(self, row: Row) -> dict[str, int]:
        deployment_id = row.count("deployment_id", minimum=1) if row.cells["deployment_id"] else 0
        endpoint_of_model = self._known(row, "model", self._endpoint_of_model)
        return {
            "request_id": row.count("request_id"),
            "endpoint_id": self._endpoint_of_deployment.get(deployment_id, endpoint_of_model),
            "deployment_id": deployment_id,
            **{name: _time_us(row, column, NOT_YET) for name, column in _TIMES.items()},
            "status": self._known(row, "status", self._statuses),
            "reason": self._known(row, "reason", self._reasons) if row.cells["reason"] else 0,
            "prompt_tokens": row.count("prompt_tokens"),
            "output_tokens": row.count("output_tokens"),
            "slo_us": _time_us(row, "slo_s", 0),
        }

    @staticmethod
    def _known(row: Row, column: str, known: dict[str, int]) -> int:
        try:
            return known[row.cells[column]]
        except KeyError:
            raise InputError(f"{row.where}: run.json knows no {column} {row.cells[column]!r}") from None


def _time_us(row: Row, column: str, absent: int) -> Micros:
    return micros(row.number(column, minimum=0, maximum=LONGEST_S)) if row.cells[column] else absent


def _read_samples(path: Path, record: _Record) -> Iterator[GpuSample]:
    for row in _read_rows(path, GPU_COLUMNS, what="GPU samples", expected=record.rows.gpus):
        yield GpuSample(
            time_us=_time_us(row, "time_s", 0),
            gpu_id=row.count("gpu"),
            memory_bytes=bytes_from_gib(row.number("memory_gib", minimum=0)),
            busy_share=row.number("busy_share", minimum=0),
        )
