"""Reads large CSV and JSON-lines files as columns, a batch of rows at a time.

Memory is bounded by a batch, whatever the file. Where a batch cannot be converted as a whole, its rows are checked
one by one to name the line with the error.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from maveriq.errors import InputError
from maveriq.input_files import SMALLER, read_lines
from maveriq.tables import Row, cells_and_header, shortened
from maveriq.units import MICROS_PER_SECOND

T = TypeVar("T")

MAX_BYTES = 1 << 30
"""The most that a file read as columns may hold, unpacked."""

_BATCH_ROWS = 1 << 14
_ROWS_AT_ONCE = 64  # a line may hold 1 MiB, of which only the chosen cells are kept
_MAX_CELL = 1_000
MAX_LIST_CHARACTERS = 1 << 16
"""A list in a cell that is longer is cut, to one character more."""

_BATCH_CHARACTERS = 8 << 20

ChooseColumns = Callable[[list[str]], Sequence[str]]
"""Returns which columns to read, given the header; raises InputError where it does not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Some rows of a file: the texts of the chosen columns, and the line of each row."""

    where: str
    columns: dict[str, Sequence[str]]
    lines: Sequence[int]

    def rows(self) -> Iterator[Row]:
        """Yield the rows one by one."""
        for number, cells in zip(self.lines, zip(*self.columns.values(), strict=True), strict=True):
            yield Row(dict(zip(self.columns, cells, strict=True)), f"{self.where}, line {number}")

    def converted(self, convert: Callable[[Batch], T], check: Callable[[Row], object]) -> T:
        """Return what `convert` makes of the batch; if it raises ValueError, name the row with the error.

        Raises:
            InputError: `convert` fails; `check` raises it for the first invalid row.
        """
        try:
            return convert(self)
        except (ValueError, OverflowError) as error:
            for row in self.rows():
                check(row)
            raise InputError(f"{self.where} cannot be used: {error}") from None


def csv_batches(
    path: Path, choose: ChooseColumns, *, what: str, remedy: str = SMALLER, long: Collection[str] = ()
) -> Iterator[Batch]:
    """Yield the rows of a CSV file with a header, in batches.

    Args:
        path: the file; it may be packed with gzip or zip.
        choose: returns which columns to read.
        what: the kind of file, for messages.
        remedy: what to do about a file that is too large, for the message.
        long: columns whose cells may be lists, of which the first 64 KiB are returned; others hold a number, a date or
            a name.

    Raises:
        InputError: the file cannot be read, a row has too few or too many cells, or there are no rows.
    """
    where = f"{what} {str(path)!r}"
    reader = csv.reader(read_lines(path, what=what, max_bytes=MAX_BYTES, remedy=remedy), strict=True)
    header: list[str] = []
    while not header and (first := _some(reader, where, 1)):  # blank lines come first
        header = first[0]
    if not header:
        raise InputError(f"{where} is empty; it needs a header")
    chosen = choose(header)
    pick = itemgetter(*(header.index(name) for name in chosen))
    picked: list[tuple[str, ...]] = []
    numbers: list[int] = []
    found, characters = False, 0
    first_line = reader.line_num + 1
    while rows := _some(reader, where, _ROWS_AT_ONCE):
        lines, rows = _numbered(rows, first_line, reader.line_num)
        first_line = reader.line_num + 1
        for number, cells in zip(lines, rows, strict=True) if {*map(len, rows)} - {len(header)} else ():
            if len(cells) != len(header):
                raise InputError(f"{where}, line {number}: {cells_and_header(cells, header)}")
        found = found or bool(rows)
        cells_of_rows = list(map(pick, rows))
        picked += cells_of_rows
        numbers += lines
        characters += sum(map(len, itertools.chain.from_iterable(cells_of_rows)))
        if len(picked) >= _BATCH_ROWS or characters > _BATCH_CHARACTERS:
            yield _batch(where, chosen, picked, numbers, long)
            picked, numbers, characters = [], [], 0
    if picked:
        yield _batch(where, chosen, picked, numbers, long)
    if not found:
        raise InputError(f"{where} has a header but no row")


def _batch(
    where: str,
    names: Sequence[str],
    rows: Sequence[tuple[str, ...]],
    lines: Sequence[int],
    long: Collection[str],
) -> Batch:
    """Return rows as a batch.

    Raises:
        InputError: a cell is longer than any number, date or name.
    """
    columns: dict[str, Sequence[str]] = dict(zip(names, zip(*rows, strict=True), strict=True))
    for name, cells in columns.items():
        if len(max(cells, key=len)) <= _MAX_CELL:
            continue
        if name in long:
            columns[name] = [cell[: MAX_LIST_CHARACTERS + 1] for cell in cells]
            continue
        number = next(number for number, cell in zip(lines, cells, strict=True) if len(cell) > _MAX_CELL)
        raise InputError(f"{where}, line {number}: {name} is longer than {_MAX_CELL:,} characters")
    return Batch(where=where, columns=columns, lines=lines)


def _some(reader: Iterator[list[str]], where: str, rows: int) -> list[list[str]]:
    """Return the next rows of a CSV file; a blank line is an empty row."""
    try:
        return list(itertools.islice(reader, rows))
    except csv.Error as error:
        raise InputError(f"{where} is not a valid CSV file: {error}") from None


def _numbered(rows: list[list[str]], first_line: int, last_line: int) -> tuple[Sequence[int], list[list[str]]]:
    """Return the rows without blank lines, and the line at which each ends."""
    if last_line - first_line + 1 == len(rows) and all(rows):
        return range(first_line, last_line + 1), rows
    ends = itertools.accumulate((1 + sum(cell.count("\n") for cell in cells) for cells in rows), initial=first_line - 1)
    numbered = [(line, cells) for line, cells in zip(itertools.islice(ends, 1, None), rows, strict=True) if cells]
    return [line for line, _ in numbered], [cells for _, cells in numbered]


def json_batches(
    path: Path, choose: ChooseColumns, *, what: str, remedy: str = SMALLER, long: Collection[str] = ()
) -> Iterator[Batch]:
    """Yield the lines of a file of JSON objects as rows, in batches; the keys of the first line are the header.

    Arguments are those of `csv_batches`. A list is returned as its JSON text.

    Raises:
        InputError: the file cannot be read, or a line is not a JSON object or lacks a chosen key.
    """
    where = f"{what} {str(path)!r}"
    lines = enumerate(read_lines(path, what=what, max_bytes=MAX_BYTES, remedy=remedy), start=1)
    objects = ((number, _json_object(line, where, number)) for number, line in lines if line.strip())
    first = next(objects)
    chosen = choose(list(first[1]))
    picked: list[tuple[str, ...]] = []
    numbers: list[int] = []
    characters = 0
    for number, found in itertools.chain([first], objects):
        cells = _json_cells(found, chosen, where, number)
        picked.append(cells)
        numbers.append(number)
        characters += sum(map(len, cells))
        if len(picked) >= _BATCH_ROWS or characters > _BATCH_CHARACTERS:
            yield _batch(where, chosen, picked, numbers, long)
            picked, numbers, characters = [], [], 0
    if picked:
        yield _batch(where, chosen, picked, numbers, long)


def _json_cells(found: dict[str, msgspec.Raw], names: Sequence[str], where: str, number: int) -> tuple[str, ...]:
    """Return the chosen values of a JSON object as text; only they are kept."""
    try:
        return tuple(
            bytes(found[name])[: MAX_LIST_CHARACTERS + 3].decode(errors="replace").strip('"') for name in names
        )
    except KeyError as error:
        raise InputError(f"{where}, line {number}: no {error.args[0]}") from None


def _json_object(line: str, where: str, number: int) -> dict[str, msgspec.Raw]:
    try:
        return msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError):
        raise InputError(f"{where}, line {number}: not a JSON object on a line of its own") from None


def floats(cells: Iterable[str]) -> np.ndarray[Any, Any]:
    """Return texts as float64.

    Raises:
        ValueError: a text is not a number.
    """
    return np.array([float(cell) for cell in cells])


def whole_numbers(cells: Iterable[str], name: str, *, minimum: int, maximum: int) -> np.ndarray[Any, Any]:
    """Return texts as int64.

    Raises:
        ValueError: a text is not a whole number from `minimum` to `maximum`.
    """
    column = floats(cells)
    if not ((column >= minimum) & (column <= maximum) & (column == np.floor(column))).all():
        raise ValueError(f"{name} must be whole numbers from {minimum} to {maximum}")
    return column.astype(np.int64)


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
            f"{row.where}: {column} must be a whole number from {minimum} to {maximum}, "
            f"not {shortened(row.cells[column])}"
        )
