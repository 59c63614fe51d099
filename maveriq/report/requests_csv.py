"""The columns of requests.csv and their fast writing: a million rows in a few seconds and little memory.

Rows with the same empty cells share one `%`-template. Templates are filled from integers alone: a
time is whole seconds and microseconds, never a formatted float. `%.0s` prints nothing for an
argument, so all templates take the same arguments. docs/decisions/0013-libraries.md compares this
with pandas and pyarrow.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maveriq.domain.records import NOT_YET, REQUEST_COLUMNS, RequestTable, RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.text import protect_cell
from maveriq.units import MICROS_PER_SECOND

Array: TypeAlias = npt.NDArray[Any]

_ROWS_AT_ONCE = 8192

# The conditions under which cells are filled, one bit each; derived cells need a completed request.
_DEPLOYED, _STARTED, _TOKEN_SEEN, _FINISHED, _COMPLETED, _TTFT, _TPOT, _SLO, _STEPS = (1 << bit for bit in range(9))
_CONDITIONS = {
    "deployment_id": _DEPLOYED,
    "start_s": _STARTED,
    "first_token_s": _TOKEN_SEEN,
    "finish_s": _FINISHED,
    "queue_s": _COMPLETED,
    "service_s": _COMPLETED,
    "latency_s": _COMPLETED,
    "ttft_s": _TTFT,
    "tpot_s": _TPOT,
    "slo_s": _SLO,
    "slo_met": _SLO,
    "steps": _STEPS,
}
_COUNTS = ("prompt_tokens", "cached_tokens", "output_tokens", "preemptions", "steps")
_TEXT_COLUMNS = ("model", "status", "reason")


def csv_cell(text: str) -> str:
    """Return a text as a CSV cell: quoted where it must be, and never a formula of a spreadsheet."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow([protect_cell(text)])
    return line.getvalue()[:-2] if text else ""


def request_lines(run: RunRecord) -> Iterator[str]:
    """Yield requests.csv, header first, in pieces of many lines."""
    yield ",".join(REQUEST_COLUMNS) + "\n"
    # Each distinct text is quoted once.
    texts = _Texts(
        models={endpoint_id: csv_cell(name) for endpoint_id, name in run.models.items()},
        statuses=[csv_cell(status.label) for status in RequestStatus],
        reasons=[csv_cell(reason) for reason in run.requests.reasons],
    )
    templates = _Templates()
    for start in range(0, len(run.requests), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        yield _lines(run.requests, rows, texts, templates)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Texts:
    """The cells of texts: models by endpoint, statuses and reasons by their index."""

    models: dict[int, str]
    statuses: list[str]
    reasons: list[str]


class _Templates(dict[int, Callable[[tuple[object, ...]], str]]):
    """Maps the filled bits of a row to the function that fills its template; made on first use."""

    def __missing__(self, bits: int) -> Callable[[tuple[object, ...]], str]:
        cells = ",".join(_cell_template(column, bits) for column in REQUEST_COLUMNS)
        fill = self[bits] = (cells + "\n").__mod__
        return fill


def _cell_template(column: str, bits: int) -> str:
    is_time = column.endswith("_s")
    condition = _CONDITIONS.get(column, 0)
    if condition & bits != condition:
        return "%.0s%.0s" if is_time else "%.0s"
    if is_time:
        return "%d.%06d"
    return "%s" if column in _TEXT_COLUMNS else "%d"


def _lines(table: RequestTable, rows: slice, texts: _Texts, templates: _Templates) -> str:
    column = numeric_columns(table, rows)
    text_columns = {
        "model": [texts.models.get(endpoint_id, "") for endpoint_id in table.endpoint_id[rows].tolist()],
        "status": list(map(texts.statuses.__getitem__, table.status[rows].tolist())),
        "reason": list(map(texts.reasons.__getitem__, table.reason[rows].tolist())),
    }
    arguments: list[list[Any]] = []
    for name in REQUEST_COLUMNS:
        if name in text_columns:
            arguments.append(text_columns[name])
        elif name.endswith("_s"):
            arguments += (part.tolist() for part in np.divmod(column[name], MICROS_PER_SECOND))
        else:
            arguments.append(column[name].tolist())
    bits = filled_bits(column).tolist()
    return "".join([templates[filled](row) for filled, row in zip(bits, zip(*arguments, strict=True), strict=True)])


def numeric_columns(table: RequestTable, rows: slice = slice(None)) -> dict[str, Array]:
    """Return the numeric columns of rows by their CSV names, with times in microseconds.

    Where a cell of requests.csv is empty, the value has no meaning; see `is_filled`.
    """
    names = ("arrival", "start", "first_token", "finish", "slo")
    column: dict[str, Array] = {f"{name}_s": getattr(table, f"{name}_us")[rows].astype(np.int64) for name in names}
    for name in ("request_id", "deployment_id", "status", *_COUNTS):
        column[name] = getattr(table, name)[rows]
    column["endpoint"] = table.endpoint_id[rows]
    completed = column["status"] == RequestStatus.COMPLETED.value
    column["queue_s"] = column["start_s"] - column["arrival_s"]
    column["service_s"] = column["finish_s"] - column["start_s"]
    column["latency_s"] = column["finish_s"] - column["arrival_s"]
    column["ttft_s"] = column["first_token_s"] - column["arrival_s"]
    tokens_after_first = np.maximum(column["output_tokens"] - 1, 1)
    between_us = column["finish_s"] - column["first_token_s"]
    column["tpot_s"] = np.rint(between_us / tokens_after_first).astype(np.int64)
    column["slo_met"] = completed & (column["latency_s"] <= column["slo_s"])
    return column


def filled_bits(column: dict[str, Array]) -> Array:
    """Return for each row which conditions of `_CONDITIONS` hold, as the sum of their bits.

    Args:
        column: the result of `numeric_columns`.
    """
    completed = column["status"] == RequestStatus.COMPLETED.value
    token_seen = column["first_token_s"] != NOT_YET
    bits: Array = (
        _DEPLOYED * (column["deployment_id"] > 0)
        + _STARTED * (column["start_s"] != NOT_YET)
        + _TOKEN_SEEN * token_seen
        + _FINISHED * (column["finish_s"] != NOT_YET)
        + _COMPLETED * completed
        + _TTFT * (completed & token_seen)
        + _TPOT * (completed & token_seen & (column["output_tokens"] > 1))
        + _SLO * (column["slo_s"] > 0)
        + _STEPS * (column["steps"] > 0)
    )
    return bits


def is_filled(name: str, bits: Array) -> Array:
    """Return for each row whether the cell of a column is filled.

    Args:
        name: the column's name in requests.csv.
        bits: the result of `filled_bits`.
    """
    condition = _CONDITIONS.get(name, 0)
    filled: Array = (bits & condition) == condition
    return filled
