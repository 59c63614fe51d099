"""Reading what tables of estimates share: cells with a fixed choice, rows with a key."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from enum import StrEnum
from typing import TypeVar

from maveriq.errors import InputError
from maveriq.tables import Row

Choice = TypeVar("Choice", bound=StrEnum)
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def choice(row: Row, column: str, options: type[Choice]) -> Choice:
    """Return a cell as a member of an enumeration.

    Raises:
        InputError: it is none of the options.
    """
    value = row.text(column)
    try:
        return options(value)
    except ValueError:
        raise InputError(f"{row.where}: {column} must be one of {', '.join(options)}, not {value!r}") from None


def unique(keyed: Iterable[tuple[Key, Value, Row]]) -> dict[Key, Value]:
    """Return values by key.

    Raises:
        InputError: a key stands twice.
    """
    found: dict[Key, Value] = {}
    for key, value, row in keyed:
        if key in found:
            raise InputError(f"{row.where}: this row says again what an earlier one says; remove one of them")
        found[key] = value
    return found
