"""Large CSV files as NumPy columns: fast where they are right, exact about what is wrong."""

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
    """Return the cells of a file's first line, [] where there is none or it is no CSV."""
    first, _, _ = text.partition("\n")
    try:
        return next(csv.reader([first.rstrip("\r")]), [])
    except csv.Error:
        return []


def parse_columns(text: str, dtypes: Mapping[str, str], *, needed: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Parse a CSV text with a header into one array per column of the header.

    Args:
        text: the whole file.
        dtypes: NumPy type of every known column ("f8" for numbers: whole ones are checked later).
        needed: columns that must be there.

    Raises:
        ValueError: anything at all is wrong; `name_fault` then says what and where.
    """
    header = header_of(text)
    body = text[text.find("\n") + 1 :]
    if set(header) - set(dtypes) or set(needed) - set(header) or len(set(header)) != len(header):
        raise ValueError("wrong columns")
    if body.isspace() or not body or "\n" not in text:
        raise ValueError("no row")
    shape = [(name, dtypes[name]) for name in header]
    table = np.loadtxt(io.StringIO(body), dtype=shape, delimiter=",", comments=None, quotechar='"', ndmin=1)
    return {name: table[name] for name in header}


def whole_numbers(column: np.ndarray[Any, Any], name: str, *, minimum: int, maximum: int) -> np.ndarray[Any, Any]:
    """Return a float column as int64.

    Raises:
        ValueError: a cell is not a whole number from `least` to `most`.
    """
    if not ((column >= minimum) & (column <= maximum) & (column == np.floor(column))).all():
        raise ValueError(f"{name} must be whole numbers from {minimum} to {maximum}")
    return column.astype(np.int64)


def check_ascending(column: np.ndarray[Any, Any], name: str) -> None:
    """Check that values never go back.

    Raises:
        ValueError: one does.
    """
    if (column[1:] < column[:-1]).any():
        raise ValueError(f"{name} goes back")


def micros_column(seconds: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return seconds as the nearest whole microseconds (int64)."""
    nearest: np.ndarray[Any, Any] = np.rint(seconds * MICROS_PER_SECOND).astype(np.int64)
    return nearest


def check_whole(row: Row, column: str, *, minimum: int, maximum: int) -> None:
    """Check one cell as `whole_numbers` does.

    Raises:
        InputError: the cell is not a whole number from `least` to `most`.
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
    """Read a file that `parse_columns` or a check refused again, row by row, to name the line.

    Args:
        path: the file.
        columns: columns that must be there.
        optional: columns that may be there.
        what: what the file is meant to be, for messages.
        check: goes through all rows and raises InputError at the first wrong one.
        reason: what to say where every row passes.

    Raises:
        InputError: always.
    """
    check(read_csv(path, columns, optional=optional, what=what))
    raise InputError(f"{what} {str(path)!r} cannot be used: {reason}")
