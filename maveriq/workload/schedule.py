"""Recorded schedules: a CSV file with one request a row, replayed as it stands.

Columns `arrival_s, endpoint, prompt_tokens, output_tokens`, and optional `service_s` (recorded
time of service) and `slo_s` (0 for none). Times have microseconds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from maveriq.errors import InputError, cannot_write
from maveriq.tables import Row, is_folder, read_text
from maveriq.units import MICROS_PER_SECOND
from maveriq.workload.base import Arrivals
from maveriq.workload.columns import (
    check_ascending,
    check_whole,
    micros_column,
    name_fault,
    parse_columns,
    whole_numbers,
)

COLUMNS = ("arrival_s", "endpoint", "prompt_tokens", "output_tokens")
OPTIONAL_COLUMNS = ("service_s", "slo_s", "priority")

_WHAT = "schedule"
_MOST_SECONDS = 1e9  # beyond, a float no longer holds every microsecond
_MOST = 100_000_000
_DTYPES = dict.fromkeys((*COLUMNS, *OPTIONAL_COLUMNS), "f8")
_LEAST_SECONDS = {"arrival_s": 0.0, "slo_s": 0.0, "service_s": 1e-6}


def read_schedule(path: Path) -> Arrivals:
    """Read a schedule file.

    Raises:
        InputError: the file, a column, or a row is wrong, or times go back; the message names the line.
    """
    return parse_schedule(read_text(path, what=_WHAT), path)


def parse_schedule(text: str, path: Path) -> Arrivals:
    """Do as `read_schedule` where the file's text is at hand already."""
    try:
        columns = parse_columns(text, _DTYPES, needed=COLUMNS)
        times = {name: _micros(columns[name], name) for name in _LEAST_SECONDS if name in columns}
        counts = {name: whole_numbers(columns[name], name, least=1, most=_MOST) for name in COLUMNS[1:]}
        priority = whole_numbers(columns["priority"], "priority", least=0, most=1) if "priority" in columns else None
        check_ascending(times["arrival_s"], "arrival_s")
    except ValueError as error:
        name_fault(path, COLUMNS, optional=OPTIONAL_COLUMNS, what=_WHAT, check=_check_rows, reason=error)
    return Arrivals(
        arrival_us=times["arrival_s"],
        endpoint_id=counts["endpoint"],
        prompt_tokens=counts["prompt_tokens"],
        output_tokens=counts["output_tokens"],
        slo_us=times.get("slo_s", np.zeros(len(times["arrival_s"]), np.int64)),
        service_us=times.get("service_s"),
        priority=priority,
    )


def _micros(seconds: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    if not ((seconds >= _LEAST_SECONDS[name]) & (seconds <= _MOST_SECONDS)).all():
        raise ValueError(f"{name} must lie between {_LEAST_SECONDS[name]:g} and {_MOST_SECONDS:g}")
    return micros_column(seconds)


def _check_rows(rows: Iterator[Row]) -> None:
    last = 0.0
    for row in rows:
        for name in (name for name in _LEAST_SECONDS if name in row.cells):
            if row.number(name, least=_LEAST_SECONDS[name]) > _MOST_SECONDS:
                raise InputError(f"{row.where}: {name} must be at most {_MOST_SECONDS:g}, not {row.cells[name]!r}")
        for name in COLUMNS[1:]:
            check_whole(row, name, least=1, most=_MOST)
        if "priority" in row.cells:
            check_whole(row, "priority", least=0, most=1)
        arrival = row.number("arrival_s")
        if arrival < last:
            raise InputError(f"{row.where}: arrival_s {arrival:g} is before {last:g} of the row above; sort by time")
        last = arrival


def write_schedule(arrivals: Arrivals, path: Path) -> None:
    """Write a schedule file that `read_schedule` reads back exactly; it appears whole or not at all.

    Raises:
        InputError: the place cannot be written to.
        MaveriqError: the disk is full.
    """
    if is_folder(path):
        raise InputError(f"schedule {str(path)!r} cannot be written: it is a folder; name a file")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(_lines(arrivals))
        partial.replace(path)
    except OSError as error:
        raise cannot_write(f"schedule {str(path)!r}", error) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _lines(arrivals: Arrivals) -> Iterator[str]:
    columns: dict[str, np.ndarray[Any, Any]] = {
        "arrival_s": arrivals.arrival_us,
        "endpoint": arrivals.endpoint_id,
        "prompt_tokens": arrivals.prompt_tokens,
        "output_tokens": arrivals.output_tokens,
    }
    if arrivals.service_us is not None:
        columns["service_s"] = arrivals.service_us
    if arrivals.slo_us.any():
        columns["slo_s"] = arrivals.slo_us
    if arrivals.priority is not None:
        columns["priority"] = arrivals.priority
    yield ",".join(columns) + "\n"
    cells = [
        (_seconds(column) if name.endswith("_s") else map(str, column.tolist())) for name, column in columns.items()
    ]
    for row in zip(*cells, strict=True):
        yield ",".join(row) + "\n"


def _seconds(micros: np.ndarray[Any, Any]) -> Iterator[str]:
    whole, rest = np.divmod(micros, MICROS_PER_SECOND)
    for seconds, fraction in zip(whole.tolist(), rest.tolist(), strict=True):
        yield f"{seconds}.{fraction:06d}"
