"""Traces by name or file: Azure counts, Poisson stages, recorded schedules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from maveriq.errors import InputError, UnknownNameError
from maveriq.tables import exists, read_text
from maveriq.workload import azure, schedule
from maveriq.workload.azure import EMBEDDED_TRACES, AzureTrace, embedded_trace, parse_azure
from maveriq.workload.base import Arrivals
from maveriq.workload.columns import header_of
from maveriq.workload.schedule import parse_schedule

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
    # A column of one kind is enough to tell them apart; what else is wrong with the header is said by the reader.
    if set(header) & set(azure.COLUMNS):
        return parse_azure(text, path)
    if set(header) & set(schedule.COLUMNS):
        return Schedule(name=path.name, arrivals=parse_schedule(text, path))
    raise InputError(
        f"trace {str(path)!r} is neither an Azure trace (columns {', '.join(azure.COLUMNS)})"
        f" nor a schedule (columns {', '.join(schedule.COLUMNS)})"
    )
