"""Azure LLM inference traces: requests per minute, and each request's own lengths.

The counts of the 2023 traces come with maveriq; the public files (and those of 2024, which have
the same columns) can be given instead. Patel et al., "Splitwise: Efficient generative LLM
inference using phase splitting", ISCA 2024.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maveriq.embedded import traces_path
from maveriq.errors import InputError, UnknownNameError
from maveriq.tables import Row, read_csv, read_text
from maveriq.workload.columns import check_ascending, check_whole, name_fault, parse_columns, whole_numbers

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
EMBEDDED_TRACES = ("code", "conversation")

_WHAT = "Azure trace"
_MOST_TOKENS = 100_000_000
_MOST_MINUTES = 1_000_000  # almost two years; a wrong year would ask for more memory than there is
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
    table = read_csv(traces_path(f"azure-{name}-per-minute.csv"), ("minute", "requests"), what=_WHAT)
    return AzureTrace(name=name, requests_per_minute=np.array([row.count("requests") for row in table], np.int64))


def read_azure(path: Path) -> AzureTrace:
    """Read a public trace file with the columns TIMESTAMP, ContextTokens, GeneratedTokens.

    Raises:
        InputError: the file, a column, or a row is wrong; the message names the line.
    """
    return parse_azure(read_text(path, what=_WHAT), path)


def parse_azure(text: str, path: Path) -> AzureTrace:
    """Do as `read_azure` where the file's text is at hand already."""
    try:
        # The files of 2024 write the offset of UTC, which NumPy would warn about.
        columns = parse_columns(
            text.replace("+00:00,", ","),
            {"TIMESTAMP": "S32", "ContextTokens": "f8", "GeneratedTokens": "f8"},
            needed=COLUMNS,
        )
        minutes = _minutes(columns["TIMESTAMP"])
        tokens = {
            # A few public rows have no token at all; a request has at least one.
            name: np.maximum(whole_numbers(columns[name], name, least=0, most=_MOST_TOKENS), 1)
            for name in COLUMNS[1:]
        }
    except ValueError as error:
        name_fault(path, COLUMNS, what=_WHAT, check=_check_rows, reason=error)
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
    if nearest[-1] - nearest[0] >= _MOST_MINUTES:
        raise ValueError(f"it spans more than {_MOST_MINUTES:,} minutes; is a year wrong?")
    return nearest


def _check_rows(rows: Iterator[Row]) -> None:
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
        for column in COLUMNS[1:]:
            check_whole(row, column, least=0, most=_MOST_TOKENS)
