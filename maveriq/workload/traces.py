"""Traces by name or file: counts of the Azure traces, Poisson stages, loads of a constant rate, files of requests.

The counts of the Azure traces of 2023 come with maveriq; the public files, and those of other collections, can be
given instead (`trace_formats`). A schedule (`schedules`) also says which endpoint each request addresses.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from maveriq.errors import InputError, UnknownNameError
from maveriq.files import exists, traces_path
from maveriq.input_files import read_head
from maveriq.tables import other_separator, read_csv
from maveriq.workload.recorded_loads import read_recorded_load, recorded_load_in
from maveriq.workload.schedules import (
    CONTENT_COLUMNS,
    SCHEDULE_COLUMNS,
    SCHEDULE_OPTIONAL_COLUMNS,
    Schedule,
    read_schedule,
)
from maveriq.workload.trace_formats import WHOLE_TRACE, RequestTrace, TracePart, read_requests, refuse_json

EMBEDDED_TRACES = ("code", "conversation")
POISSON, CONSTANT, SYNTHETIC = "poisson", "constant", "synthetic"
TRACES = (*EMBEDDED_TRACES, POISSON, CONSTANT, SYNTHETIC)
"""The traces that are known by name."""

_LONG_LINE = 50_000  # the head of a file may hold a part of such a line
_SUFFIXES = (".csv", ".gz", ".zip", ".json", ".jsonl", ".txt", ".tsv", ".zst")


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedTrace:
    """A trace of which only the counts per minute are known, from its first to its last minute.

    The quantiles of `traces/azure-lengths.csv` stand in for its lengths.
    """

    name: str
    requests_per_minute: np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticLoad:
    """Arrivals that are drawn or spaced without a trace, without lengths of their own."""

    name: str


Trace: TypeAlias = CountedTrace | RequestTrace | SyntheticLoad | Schedule


def embedded_trace(name: str) -> CountedTrace:
    """Return the counts of `code` or `conversation` that come with maveriq.

    Raises:
        UnknownNameError: another name.
    """
    if name not in EMBEDDED_TRACES:
        raise UnknownNameError("trace", name, EMBEDDED_TRACES)
    table = read_csv(traces_path(f"azure-{name}-per-minute.csv"), ("minute", "requests"), what="Azure trace")
    return CountedTrace(name=name, requests_per_minute=np.array([row.count("requests") for row in table], np.int64))


def load_trace(name_or_path: str, part: TracePart = WHOLE_TRACE) -> Trace:
    """Return a trace by name, or read a file, whose header says what it is.

    Args:
        name_or_path: one of `TRACES`, or the path of a file, which may be packed with gzip or zip.
        part: what is needed of a file.

    Raises:
        UnknownNameError: neither a known name nor a path.
        InputError: the file cannot be used; the message names the line.
    """
    if name_or_path in (POISSON, CONSTANT, SYNTHETIC):
        return SyntheticLoad(name=name_or_path)
    if name_or_path in EMBEDDED_TRACES:
        return embedded_trace(name_or_path)
    path = Path(name_or_path)
    if not (path.suffix in _SUFFIXES or "/" in name_or_path or exists(path)):
        raise UnknownNameError("trace", name_or_path, TRACES, "or give the path of a CSV file")
    return read_trace(path, part)


def read_trace(path: Path, part: TracePart = WHOLE_TRACE, *, benchmark: int | None = None) -> RequestTrace | Schedule:
    """Read a file, whose start says which kind of trace it is.

    Args:
        path: the file.
        part: of a large file of requests, at least this is read.
        benchmark: which benchmark of a report, from 1; None if it has one.

    Raises:
        InputError: the file cannot be used; the message names the line.
    """
    where = f"trace {str(path)!r}"
    head = read_head(path, what="trace")
    start = head.lstrip()
    if not start:
        raise InputError(f"{where} is empty; give a trace with a time and token counts for each request")
    first_line = start.partition("\n")[0].rstrip("\r")
    if kind := recorded_load_in(head):
        return read_recorded_load(path, kind, benchmark=benchmark)
    if benchmark is not None:
        raise InputError(f"{where} is no report with several benchmarks; leave out --benchmark")
    if start[0] in "[{":
        keys = _keys(first_line)
        is_long_line = start[0] == "{" and first_line == start.rstrip("\r") and len(head) > _LONG_LINE
        if not (keys or is_long_line) or keys & {"conversations", "messages", "prompt"}:
            refuse_json(head, where)
        return read_requests(path, json_lines=True, part=part)
    header = _header(first_line)
    if separator := other_separator(header):
        raise InputError(f"{where} is separated by {separator}; save it with commas")
    of_schedules = set(SCHEDULE_OPTIONAL_COLUMNS) - set(CONTENT_COLUMNS.values())
    if "endpoint" in header or (set(header) & of_schedules and set(header) & set(SCHEDULE_COLUMNS)):
        return read_schedule(path)
    return read_requests(path, part=part)


def _header(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:  # a cell that is too long; the reader of the file reports it
        return [line[:100]]


def _keys(line: str) -> set[str]:
    """Return the keys of a JSON object, an empty set for anything else."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return set()
    return set(found) if isinstance(found, dict) else set()
