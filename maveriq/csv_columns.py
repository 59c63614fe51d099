"""Reads large CSV files as NumPy columns.

`parse_columns` parses a whole file at once. If that or a check fails, `name_fault` reads the file
again row by row to name the line with the error.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from maveriq.errors import InputError
from maveriq.tables import Row, read_csv
from maveriq.units import MICROS_PER_SECOND


def header_of(text: str) -> list[str]:
    """Return the cells of the first line, [] if there is none or it is not CSV."""
    first, _, _ = text.partition("\n")
    try:
        return next(csv.reader([first.rstrip("\r")]), [])
    except csv.Error:
        return []


def parse_columns(text: str, dtypes: Mapping[str, str], *, needed: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Parse a CSV text with a header into one array per column of the header.

    Args:
        text: the whole file.
        dtypes: NumPy type of every known column ("f8" for all numbers; `whole_numbers` checks integers).
        needed: required columns.

    Raises:
        ValueError: the file is invalid; `name_fault` then reports what and where.
    """
    header = header_of(text)
    rows = text[text.find("\n") + 1 :]
    if set(header) - set(dtypes) or set(needed) - set(header) or len(set(header)) != len(header):
        raise ValueError("wrong columns")
    if rows.isspace() or not rows or "\n" not in text:
        raise ValueError("no row")
    shape = [(name, dtypes[name]) for name in header]
    table = np.loadtxt(io.StringIO(rows), dtype=shape, delimiter=",", comments=None, quotechar='"', ndmin=1)
    return {name: table[name] for name in header}


def whole_numbers(column: np.ndarray[Any, Any], name: str, *, minimum: int, maximum: int) -> np.ndarray[Any, Any]:
    """Return a float column as int64.

    Raises:
        ValueError: a cell is not a whole number from `minimum` to `maximum`.
    """
    if not ((column >= minimum) & (column <= maximum) & (column == np.floor(column))).all():
        raise ValueError(f"{name} must be whole numbers from {minimum} to {maximum}")
    return column.astype(np.int64)


def check_ascending(column: np.ndarray[Any, Any], name: str) -> None:
    """Check that values never decrease.

    Raises:
        ValueError: a value is smaller than the one before it.
    """
    if (column[1:] < column[:-1]).any():
        raise ValueError(f"{name} goes back")


def micros_column(seconds: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return seconds as whole microseconds (int64), rounded to nearest."""
    nearest: np.ndarray[Any, Any] = np.rint(seconds * MICROS_PER_SECOND).astype(np.int64)
    return nearest


def check_whole(row: Row, column: str, *, minimum: int, maximum: int) -> None:
    """Check one cell as `whole_numbers` does.

    Raises:
        InputError: the cell is not a whole number from `minimum` to `maximum`.
    """
    value = row.number(column)
    if not (minimum <= value <= maximum and value.is_integer()):
        raise InputError(
            f"{row.where}: {column} must be a whole number from {minimum} to {maximum}, not {row.cells[column]!r}"
        )


def name_fault(
    path: Path,
    columns: Sequence[str],
    *,
    optional: Sequence[str] = (),
    what: str,
    check: Callable[[Iterator[Row]], None],
    reason: object,
) -> NoReturn:
    """Report the error in a file that failed `parse_columns` or a check: read it again row by row to name the line.

    Args:
        path: the file.
        columns: required columns.
        optional: optional columns.
        what: the kind of file, for messages.
        check: reads all rows and raises InputError at the first invalid one.
        reason: the message if every row passes.

    Raises:
        InputError: always.
    """
    check(read_csv(path, columns, optional=optional, what=what))
    raise InputError(f"{what} {str(path)!r} cannot be used: {reason}")
