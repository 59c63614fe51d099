"""Traces by name or file: Azure LLM inference traces, Poisson stages, and recorded schedules.

Azure traces hold requests per minute and the lengths of each request. The counts of the 2023
traces come with maveriq; the public files, and those of 2024 with the same columns, can be given
instead. Patel et al., "Splitwise: Efficient generative LLM inference using phase splitting", ISCA 2024.

A schedule is a CSV file with one request per row, replayed as recorded: columns `arrival_s,
endpoint, prompt_tokens, output_tokens`, and optional `service_s` (recorded service time), `slo_s`
(0 for none) and `priority` (0 or 1). Times have a resolution of one microsecond.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from maveriq.csv_columns import (
    check_ascending,
    check_whole,
    header_of,
    micros_column,
    name_fault,
    parse_columns,
    whole_numbers,
)
from maveriq.errors import InputError, UnknownNameError
from maveriq.files import exists, traces_path, written_whole
from maveriq.tables import Row, read_csv, read_text
from maveriq.units import MICROS_PER_SECOND
from maveriq.workload.requests import Arrivals

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
EMBEDDED_TRACES = ("code", "conversation")

_AZURE = "Azure trace"
_MAX_TOKENS = 100_000_000
_MAX_MINUTES = 1_000_000  # almost two years; a wrong year would ask for more memory than there is
_NS_PER_MINUTE = 60_000_000_000
# Between these years nanoseconds fit into 64 bits.
_TIMESTAMP = re.compile(rb"(19[7-9]\d|20\d\d|21\d\d|22[0-5]\d)-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d{1,9})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """Context and generated tokens of every request of a trace, in its order, at least 1 each."""

    context_tokens: np.ndarray[Any, Any]
    generated_tokens: np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class AzureTrace:
    """A trace as counts per minute, from its first to its last minute.

    `rows` are its requests' lengths, None where only the counts are embedded; then the
    quantiles of `traces/azure-lengths.csv` stand in.
    """

    name: str
    requests_per_minute: np.ndarray[Any, Any]
    rows: TokenRows | None = None


def embedded_trace(name: str) -> AzureTrace:
    """Return the counts of `code` or `conversation` that come with maveriq.

    Raises:
        UnknownNameError: another name.
    """
    if name not in EMBEDDED_TRACES:
        raise UnknownNameError("trace", name, EMBEDDED_TRACES)
    table = read_csv(traces_path(f"azure-{name}-per-minute.csv"), ("minute", "requests"), what=_AZURE)
    return AzureTrace(name=name, requests_per_minute=np.array([row.count("requests") for row in table], np.int64))


def read_azure(path: Path) -> AzureTrace:
    """Read a public trace file with the columns TIMESTAMP, ContextTokens, GeneratedTokens.

    Raises:
        InputError: the file, a column, or a row is wrong; the message names the line.
    """
    return parse_azure(read_text(path, what=_AZURE), path)


def parse_azure(text: str, path: Path) -> AzureTrace:
    """Do as `read_azure` where the file's text is at hand already."""
    try:
        # The files of 2024 write the offset of UTC, which NumPy would warn about.
        columns = parse_columns(
            text.replace("+00:00,", ","),
            {"TIMESTAMP": "S32", "ContextTokens": "f8", "GeneratedTokens": "f8"},
            needed=AZURE_COLUMNS,
        )
        minutes = _minutes(columns["TIMESTAMP"])
        tokens = {
            # A few public rows have no token at all; a request has at least one.
            name: np.maximum(whole_numbers(columns[name], name, minimum=0, maximum=_MAX_TOKENS), 1)
            for name in AZURE_COLUMNS[1:]
        }
    except ValueError as error:
        name_fault(path, AZURE_COLUMNS, what=_AZURE, check=_check_azure_rows, reason=error)
    return AzureTrace(
        name=path.name,
        requests_per_minute=np.bincount(minutes - minutes[0]),
        rows=TokenRows(context_tokens=tokens["ContextTokens"], generated_tokens=tokens["GeneratedTokens"]),
    )


def _minutes(timestamps: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return each timestamp's nearest minute since 1970; halves go to the even minute, as in pandas."""
    if not all(map(_TIMESTAMP.fullmatch, timestamps.tolist())):
        raise ValueError("TIMESTAMP must look like 2023-11-16 18:17:03.9799600")
    nanoseconds = timestamps.astype("datetime64[ns]").astype(np.int64)
    check_ascending(nanoseconds, "TIMESTAMP")
    minutes, rest = np.divmod(nanoseconds, _NS_PER_MINUTE)
    half = _NS_PER_MINUTE // 2
    nearest: np.ndarray[Any, Any] = minutes + ((rest > half) | ((rest == half) & (minutes % 2 == 1)))
    if nearest[-1] - nearest[0] >= _MAX_MINUTES:
        raise ValueError(f"it spans more than {_MAX_MINUTES:,} minutes; is a year wrong?")
    return nearest


def _check_azure_rows(rows: Iterator[Row]) -> None:
    last = np.datetime64(0, "ns")
    for row in rows:
        cell = row.text("TIMESTAMP").removesuffix("+00:00")
        try:
            moment = np.datetime64(cell, "ns") if _TIMESTAMP.fullmatch(cell.encode()) else None
        except ValueError:
            moment = None
        if moment is None:
            raise InputError(f"{row.where}: TIMESTAMP must look like 2023-11-16 18:17:03.9799600, not {cell!r}")
        if moment < last:
            raise InputError(f"{row.where}: TIMESTAMP {cell!r} is before that of the row above; sort the file by time")
        last = moment
        for column in AZURE_COLUMNS[1:]:
            check_whole(row, column, minimum=0, maximum=_MAX_TOKENS)


SCHEDULE_COLUMNS = ("arrival_s", "endpoint", "prompt_tokens", "output_tokens")
SCHEDULE_OPTIONAL_COLUMNS = ("service_s", "slo_s", "priority")

_SCHEDULE = "schedule"
_MAX_SECONDS = 1e9  # beyond, a float no longer holds every microsecond
_MAX_COUNT = 100_000_000
_DTYPES = dict.fromkeys((*SCHEDULE_COLUMNS, *SCHEDULE_OPTIONAL_COLUMNS), "f8")
_MIN_SECONDS = {"arrival_s": 0.0, "slo_s": 0.0, "service_s": 1e-6}


def read_schedule(path: Path) -> Arrivals:
    """Read a schedule file.

    Raises:
        InputError: the file, a column, or a row is wrong, or times go back; the message names the line.
    """
    return parse_schedule(read_text(path, what=_SCHEDULE), path)


def parse_schedule(text: str, path: Path) -> Arrivals:
    """Do as `read_schedule` where the file's text is at hand already."""
    try:
        columns = parse_columns(text, _DTYPES, needed=SCHEDULE_COLUMNS)
        times = {name: _micros(columns[name], name) for name in _MIN_SECONDS if name in columns}
        counts = {
            name: whole_numbers(columns[name], name, minimum=1, maximum=_MAX_COUNT) for name in SCHEDULE_COLUMNS[1:]
        }
        priority = (
            whole_numbers(columns["priority"], "priority", minimum=0, maximum=1) if "priority" in columns else None
        )
        check_ascending(times["arrival_s"], "arrival_s")
    except ValueError as error:
        name_fault(
            path,
            SCHEDULE_COLUMNS,
            optional=SCHEDULE_OPTIONAL_COLUMNS,
            what=_SCHEDULE,
            check=_check_schedule_rows,
            reason=error,
        )
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
    if not ((seconds >= _MIN_SECONDS[name]) & (seconds <= _MAX_SECONDS)).all():
        raise ValueError(f"{name} must lie between {_MIN_SECONDS[name]:g} and {_MAX_SECONDS:g}")
    return micros_column(seconds)


def _check_schedule_rows(rows: Iterator[Row]) -> None:
    last = 0.0
    for row in rows:
        for name in (name for name in _MIN_SECONDS if name in row.cells):
            if row.number(name, minimum=_MIN_SECONDS[name]) > _MAX_SECONDS:
                raise InputError(f"{row.where}: {name} must be at most {_MAX_SECONDS:g}, not {row.cells[name]!r}")
        for name in SCHEDULE_COLUMNS[1:]:
            check_whole(row, name, minimum=1, maximum=_MAX_COUNT)
        if "priority" in row.cells:
            check_whole(row, "priority", minimum=0, maximum=1)
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
    with written_whole(path, what="schedule") as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(_lines(arrivals))


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


POISSON = "poisson"
TRACES = (*EMBEDDED_TRACES, POISSON)
"""The traces that are known by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoissonTrace:
    """Two-minute stages of alternating rate, without lengths of their own."""

    name: str = POISSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A recorded schedule, replayed as it stands."""

    name: str
    arrivals: Arrivals


Trace: TypeAlias = AzureTrace | PoissonTrace | Schedule


def load_trace(name_or_path: str) -> Trace:
    """Return a trace by name, or read a CSV file, whose header says what it is.

    Args:
        name_or_path: one of `TRACES`, or the path of an Azure trace or a schedule (may be packed with gzip).

    Raises:
        UnknownNameError: neither a known name nor a path.
        InputError: the file cannot be used; the message names the line.
    """
    if name_or_path == POISSON:
        return PoissonTrace()
    if name_or_path in EMBEDDED_TRACES:
        return embedded_trace(name_or_path)
    path = Path(name_or_path)
    if not (path.suffix in (".csv", ".gz") or "/" in name_or_path or exists(path)):
        raise UnknownNameError("trace", name_or_path, TRACES, "or give the path of a CSV file")
    return read_trace(path)


def read_trace(path: Path) -> AzureTrace | Schedule:
    """Read a CSV file, whose header says which kind of trace it is.

    Raises:
        InputError: the file cannot be used; the message names the line.
    """
    text = read_text(path, what="trace")
    if not text.strip():
        raise InputError(f"trace {str(path)!r} is empty; give an Azure trace or a schedule")
    header = header_of(text)
    # One column of a kind is enough to tell the formats apart. The reader reports what else is wrong with the header.
    if set(header) & set(AZURE_COLUMNS):
        return parse_azure(text, path)
    if set(header) & set(SCHEDULE_COLUMNS):
        return Schedule(name=path.name, arrivals=parse_schedule(text, path))
    raise InputError(
        f"trace {str(path)!r} is neither an Azure trace (columns {', '.join(AZURE_COLUMNS)})"
        f" nor a schedule (columns {', '.join(SCHEDULE_COLUMNS)})"
    )
