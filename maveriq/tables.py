"""Strict readers of TOML, JSON and CSV files; errors name the file, the line or key, and the value.

`csv_columns` reads large CSV files as NumPy columns.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from maveriq.compat import StrEnum
from maveriq.errors import InputError, did_you_mean
from maveriq.input_files import read_lines, read_text
from maveriq.text import unprotect_cell

T = TypeVar("T")

MAX_TABLE_BYTES = 32 << 20
"""The most that a table read by row may hold, unless its reader allows more."""

_MAX_SHOWN = 80
_MAX_TOML_BYTES, _MAX_JSON_BYTES = 2 << 20, 16 << 20  # parsed, a file takes up to thirty times its size


def read_toml(path: Path, shape: type[T], *, what: str) -> T:
    """Read a TOML file into a `msgspec.Struct`, which must be declared with `forbid_unknown_fields=True`.

    Raises:
        InputError: invalid TOML, an unknown key, a missing key, or a value of the wrong type or range.
    """
    import tomllib  # late: an engine's process may run on Python 3.10, which has none

    text = read_text(path, what=what, max_bytes=_MAX_TOML_BYTES)
    try:
        return msgspec.convert(tomllib.loads(text), shape)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{what} {str(path)!r} is not valid TOML: {error}") from None
    except msgspec.ValidationError as error:
        raise InputError(f"{what} {str(path)!r}: {readable_error(str(error), shape)}") from None
    except (ValueError, RecursionError):  # a number with thousands of digits, thousands of nested brackets
        raise InputError(f"{what} {str(path)!r}: a number is too long, or brackets too deep; shorten it") from None


def read_json(path: Path, shape: type[T], *, what: str) -> T:
    """Read a JSON file into a `msgspec.Struct`, which must be declared with `forbid_unknown_fields=True`.

    Raises:
        InputError: invalid JSON (NaN and Infinity are invalid), an unknown key, a missing key, or a
            value of the wrong type or range.
    """
    text = read_text(path, what=what, max_bytes=_MAX_JSON_BYTES)
    try:
        return msgspec.json.decode(text, type=shape)
    except msgspec.ValidationError as error:
        raise InputError(f"{what} {str(path)!r}: {readable_error(str(error), shape)}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"{what} {str(path)!r} is not valid JSON: {error}") from None


_PLACE = re.compile(r" - at `\$\.?([^`]*)`$")
_STEP = re.compile(r"\[[^\]]*\]|[^.\[]+")
_UNKNOWN_KEY = re.compile(r"Object contains unknown field `([^`]*)`")
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


def readable_error(message: str, shape: Any = None) -> str:
    """Rewrite a msgspec message, such as "Object contains unknown field `x` - at `$.a[0]`", for users.

    Args:
        message: the message.
        shape: the type that was expected; an unknown key then gets a suggestion.
    """
    at = _PLACE.search(message)
    place, text = (at[1], message[: at.start()]) if at else ("", message)
    if unknown := _UNKNOWN_KEY.fullmatch(text):
        inside = f" (in {place})" if place else ""
        return f"unknown key `{unknown[1]}`{inside}{_suggestion(unknown[1], _keys_at(shape, place))}"
    expected = _EXPECTED.fullmatch(text)
    if text == "Number out of range":
        return f"{place or 'it'} is too long a number"
    if expected:
        return f"{place or 'it'} must be {_expected(expected)}"
    text = text.replace("Object missing required field", "missing key")
    return f"{text} (in {place})" if place else text


def _suggestion(name: str, known: Sequence[str]) -> str:
    """Return what to write in place of an unknown key: a near one, or the list of all."""
    return did_you_mean(name, known) or (f"; known keys: {', '.join(sorted(known))}" if known else "")


def _keys_at(shape: Any, place: str) -> list[str]:
    """Return the keys of the table at a place such as `models[0]` of a file of a given shape; [] if unknown."""
    found = msgspec.inspect.type_info(shape) if shape is not None else None
    for step in _STEP.findall(place):
        found = _inside(found, step)
    table = _table_type(found)
    return [field.encode_name for field in table.fields] if table is not None else []


def _inside(kind: msgspec.inspect.Type | None, step: str) -> msgspec.inspect.Type | None:
    """Return the type of a part of a value: of a key, or of `[0]` or `[...]`."""
    for option in kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,):
        if isinstance(option, msgspec.inspect.StructType):
            for field in option.fields:
                if field.encode_name == step:
                    return field.type
        elif isinstance(option, msgspec.inspect.DictType):
            return option.value_type
        elif isinstance(option, (msgspec.inspect.ListType, msgspec.inspect.VarTupleType)):
            return option.item_type
    return None


def _table_type(kind: msgspec.inspect.Type | None) -> msgspec.inspect.StructType | None:
    for option in kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,):
        if isinstance(option, msgspec.inspect.StructType):
            return option
    return None


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


def shortened(text: str) -> str:
    """Return a text in quotes for a message, cut to 80 characters."""
    return repr(text) if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]!r}..."


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
            raise InputError(f"{self.where}: {column} must be a number, not {shortened(raw)}") from None
        if not math.isfinite(value) or not minimum <= value <= maximum:
            bound = f" of at least {minimum:g}" if minimum > -math.inf else ""
            if maximum < math.inf:
                bound = f" from {minimum:g} to {maximum:g}"
            raise InputError(f"{self.where}: {column} must be a finite number{bound}, not {shortened(raw)}")
        return value

    def count(self, column: str, *, minimum: int = 0) -> int:
        """Return a cell as a whole number of at least `minimum`."""
        raw = self.cells[column]
        # With at most 15 digits every number is exact as a float, and no cell can exhaust memory.
        if not re.fullmatch(r"-?\d{1,15}", raw) or int(raw) < minimum:
            raise InputError(
                f"{self.where}: {column} must be a whole number of at least {minimum}, not {shortened(raw)}"
            )
        return int(raw)


def read_csv(
    path: Path,
    columns: Sequence[str],
    *,
    what: str,
    optional: Sequence[str] = (),
    may_be_empty: bool = False,
    max_bytes: int = MAX_TABLE_BYTES,
) -> Iterator[Row]:
    """Yield the rows of a CSV file with a header.

    Args:
        path: the file; it may be packed with gzip or zip.
        columns: required columns.
        optional: optional columns; any other column is an error.
        what: the kind of file, for messages.
        may_be_empty: accept a header without rows.
        max_bytes: the most that the file may hold, unpacked.

    Raises:
        InputError: the file cannot be read, a column is missing or unknown, a row has too few or
            too many cells, or there are no rows.
    """
    reader = csv.reader(read_lines(path, what=what, max_bytes=max_bytes), strict=True)
    lines = _lines(reader, path, what)
    header = next(lines, [])
    if not header:
        raise InputError(f"{what} {str(path)!r} is empty; it needs a header with {', '.join(columns)}")
    check_header(header, columns, optional, f"{what} {str(path)!r}")
    empty = True
    for cells in lines:
        where = f"{what} {str(path)!r}, line {reader.line_num}"
        if len(cells) != len(header):
            raise InputError(f"{where}: {cells_and_header(cells, header)}")
        empty = False
        yield Row(dict(zip(header, map(unprotect_cell, cells), strict=True)), where)
    if empty and not may_be_empty:
        raise InputError(f"{what} {str(path)!r} has a header but no row")


def _lines(reader: Iterator[list[str]], path: Path, what: str) -> Iterator[list[str]]:
    try:
        yield from (cells for cells in reader if cells)
    except csv.Error as error:
        raise InputError(f"{what} {str(path)!r} is not a valid CSV file: {error}") from None


def cells_and_header(cells: Sequence[str], header: Sequence[str]) -> str:
    """Return what is wrong with a row of too few or too many cells."""
    surplus = f"; surplus: {', '.join(map(repr, cells[len(header) :]))}"[:80] if len(cells) > len(header) else ""
    return f"{len(cells)} cells where the header has {len(header)}{surplus}"


_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}


def other_separator(header: Sequence[str]) -> str:
    """Return what separates the cells of a header that has no comma, "" if nothing does."""
    only = header[0] if len(header) == 1 else ""
    return next((name for separator, name in _SEPARATORS.items() if separator in only), "")


def check_header(header: Sequence[str], columns: Sequence[str], optional: Sequence[str], where: str) -> None:
    """Check that a header has all required columns, no unknown one, and none twice.

    Raises:
        InputError: it does not; the message names the column.
    """
    known = [*columns, *optional]
    if separator := other_separator(header):
        raise InputError(f"{where} is separated by {separator}; save it with commas (needs {', '.join(columns)})")
    missing = [name for name in columns if name not in header]
    unknown = [name for name in header if name not in known]
    if missing:
        near = next((f"; rename {name!r}?" for name in unknown if did_you_mean(name, missing)), "")
        raise InputError(f"{where}: no column {', '.join(missing)}{near} (needs {', '.join(columns)})")
    if unknown:
        near = did_you_mean(unknown[0], known)
        raise InputError(f"{where}: unknown column {', '.join(unknown)}{near} (knows {', '.join(known)})")
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
        near = did_you_mean(value, options)
        raise InputError(
            f"{row.where}: {column} must be one of {', '.join(options)}, not {shortened(value)}{near}"
        ) from None


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
