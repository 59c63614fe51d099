"""Strict readers of TOML, JSON and CSV files; errors name the file, the line or key, and the value.

`csv_columns` reads large CSV files as NumPy columns.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
import tomllib
import zlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import msgspec

from maveriq.errors import InputError

T = TypeVar("T")


def read_text(path: Path, *, what: str) -> str:
    """Return the text of a file, decompressed if its name ends in .gz.

    Args:
        path: the file.
        what: the kind of file, for messages ("trace", "model set").

    Raises:
        InputError: the file is missing, is a folder, cannot be read, or is not UTF-8.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{what} {str(path)!r} does not exist; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{what} {str(path)!r} is a folder; name a file") from None
    except UnicodeDecodeError:
        raise InputError(f"{what} {str(path)!r} is not a text file in UTF-8") from None
    except OSError as error:
        raise InputError(f"{what} {str(path)!r} cannot be read: {error.strerror or error}; give another file") from None
    except (EOFError, ValueError, zlib.error) as error:  # truncated, a null byte in the name, corrupt
        raise InputError(f"{what} {str(path)!r} cannot be read: {error}; give another file") from None


def read_toml(path: Path, shape: type[T], *, what: str) -> T:
    """Read a TOML file into a `msgspec.Struct`, which must be declared with `forbid_unknown_fields=True`.

    Raises:
        InputError: invalid TOML, an unknown key, a missing key, or a value of the wrong type or range.
    """
    text = read_text(path, what=what)
    try:
        return msgspec.convert(tomllib.loads(text), shape)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{what} {str(path)!r} is not valid TOML: {error}") from None
    except msgspec.ValidationError as error:
        raise InputError(f"{what} {str(path)!r}: {readable_error(str(error))}") from None
    except (ValueError, RecursionError):  # a number with thousands of digits, thousands of nested brackets
        raise InputError(f"{what} {str(path)!r}: a number is too long, or brackets too deep; shorten it") from None


def read_json(path: Path, shape: type[T], *, what: str) -> T:
    """Read a JSON file into a `msgspec.Struct`, which must be declared with `forbid_unknown_fields=True`.

    Raises:
        InputError: invalid JSON (NaN and Infinity are invalid), an unknown key, a missing key, or a
            value of the wrong type or range.
    """
    text = read_text(path, what=what)
    try:
        return msgspec.json.decode(text, type=shape)
    except msgspec.ValidationError as error:
        raise InputError(f"{what} {str(path)!r}: {readable_error(str(error))}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"{what} {str(path)!r} is not valid JSON: {error}") from None


_PLACE = re.compile(r" - at `\$\.?([^`]*)`$")
_EXPECTED = re.compile(
    r"Expected `(?P<kind>\w+)[^`]*`(?P<length> of length)?(?: (?P<sign>[<>]=?) (?P<bound>[^ ,]+))?"
    r"(?:, got `(?P<got>\w+)[^`]*`)?"
)
_KINDS = {
    "int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "array": "a list",
    "object": "a table", "null": "nothing",
}  # fmt: skip
_GOT = _KINDS | {"float": "a fraction", "bool": "true or false"}
_SIGNS = {">=": "at least", ">": "more than", "<=": "at most", "<": "less than"}


def readable_error(message: str) -> str:
    """Rewrite a msgspec message, such as "Object contains unknown field `x` - at `$.a[0]`", for users."""
    at = _PLACE.search(message)
    place, text = (at[1], message[: at.start()]) if at else ("", message)
    expected = _EXPECTED.fullmatch(text)
    if text == "Number out of range":
        return f"{place or 'it'} is too long a number"
    if expected:
        return f"{place or 'it'} must be {_expected(expected)}"
    text = text.replace("Object contains unknown field", "unknown key")
    text = text.replace("Object missing required field", "missing key")
    return f"{text} (in {place})" if place else text


def _expected(found: re.Match[str]) -> str:
    kind = _KINDS.get(found["kind"], found["kind"])
    bound = got = ""
    if found["sign"]:
        bound = f" of {'length ' if found['length'] else ''}{_SIGNS[found['sign']]} {_short(found['bound'])}"
    if found["got"]:
        got = f", not {_GOT.get(found['got'], found['got'])}"
    return f"{kind}{bound}{got}"


def _short(number: str) -> str:
    """Return a number without needless decimals and with thousands separators: 1 for 1.0, 1,000,000 for 1000000.0."""
    return f"{float(number):,.12g}"


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a CSV file; `where` names the file and line."""

    cells: dict[str, str]
    where: str

    def text(self, column: str) -> str:
        """Return a cell, which must not be empty."""
        value = self.cells[column]
        if not value:
            raise InputError(f"{self.where}: {column} is empty")
        return value

    def number(self, column: str, *, minimum: float = -math.inf, maximum: float = math.inf) -> float:
        """Return a cell as a finite number from `minimum` to `maximum`."""
        raw = self.cells[column]
        try:
            value = float(raw)
        except ValueError:
            raise InputError(f"{self.where}: {column} must be a number, not {raw!r}") from None
        if not math.isfinite(value) or not minimum <= value <= maximum:
            bound = f" of at least {minimum:g}" if minimum > -math.inf else ""
            if maximum < math.inf:
                bound = f" from {minimum:g} to {maximum:g}"
            raise InputError(f"{self.where}: {column} must be a finite number{bound}, not {raw!r}")
        return value

    def count(self, column: str, *, minimum: int = 0) -> int:
        """Return a cell as a whole number of at least `minimum`."""
        raw = self.cells[column]
        # With at most 15 digits every number is exact as a float, and no cell can exhaust memory.
        if not re.fullmatch(r"-?\d{1,15}", raw) or int(raw) < minimum:
            raise InputError(f"{self.where}: {column} must be a whole number of at least {minimum}, not {raw!r}")
        return int(raw)


def read_csv(
    path: Path, columns: Sequence[str], *, what: str, optional: Sequence[str] = (), may_be_empty: bool = False
) -> Iterator[Row]:
    """Yield the rows of a CSV file with a header.

    Args:
        path: the file, compressed with gzip if its name ends in .gz.
        columns: required columns.
        optional: optional columns; any other column is an error.
        what: the kind of file, for messages.
        may_be_empty: accept a header without rows.

    Raises:
        InputError: the file cannot be read, a column is missing or unknown, a row has too few or
            too many cells, or there are no rows.
    """
    reader = csv.reader(io.StringIO(read_text(path, what=what), newline=""), strict=True)
    lines = _lines(reader, path, what)
    header = next(lines, [])
    if not header:
        raise InputError(f"{what} {str(path)!r} is empty; it needs a header with {', '.join(columns)}")
    _check_header(header, columns, optional, f"{what} {str(path)!r}")
    empty = True
    for cells in lines:
        where = f"{what} {str(path)!r}, line {reader.line_num}"
        if len(cells) != len(header):
            raise InputError(f"{where}: {len(cells)} cells where the header has {len(header)}")
        empty = False
        yield Row(dict(zip(header, cells, strict=True)), where)
    if empty and not may_be_empty:
        raise InputError(f"{what} {str(path)!r} has a header but no row")


def _lines(reader: Iterator[list[str]], path: Path, what: str) -> Iterator[list[str]]:
    try:
        yield from (cells for cells in reader if cells)
    except csv.Error as error:
        raise InputError(f"{what} {str(path)!r} is not a valid CSV file: {error}") from None


def _check_header(header: list[str], columns: Sequence[str], optional: Sequence[str], where: str) -> None:
    missing = [name for name in columns if name not in header]
    if missing:
        raise InputError(f"{where}: no column {', '.join(missing)} (needs {', '.join(columns)})")
    unknown = [name for name in header if name not in columns and name not in optional]
    if unknown:
        raise InputError(f"{where}: unknown column {', '.join(unknown)} (knows {', '.join([*columns, *optional])})")
    if len(set(header)) != len(header):
        raise InputError(f"{where}: a column stands twice in the header")


Choice = TypeVar("Choice", bound=StrEnum)
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def choice(row: Row, column: str, options: type[Choice]) -> Choice:
    """Return a cell as a member of an enumeration.

    Raises:
        InputError: the value is not a member.
    """
    value = row.text(column)
    try:
        return options(value)
    except ValueError:
        raise InputError(f"{row.where}: {column} must be one of {', '.join(options)}, not {value!r}") from None


def unique(keyed: Iterable[tuple[Key, Value, Row]]) -> dict[Key, Value]:
    """Return values by key.

    Raises:
        InputError: a key occurs twice.
    """
    found: dict[Key, Value] = {}
    for key, value, row in keyed:
        if key in found:
            raise InputError(f"{row.where}: this row says again what an earlier one says; remove one of them")
        found[key] = value
    return found
