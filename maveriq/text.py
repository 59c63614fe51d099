"""Text from outside: which names are accepted, and how text is made safe to print and to open in a spreadsheet."""

from __future__ import annotations

import re

from maveriq.errors import InputError

MAX_NAME_LENGTH = 200
_MAX_PATH_LENGTH = 4_096

# Control characters except line feed and tab, marks that change the direction of text, and lone surrogates.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def check_name(name: str, what: str, *, remedy: str = "") -> None:
    """Check the name of a model or model set, which addresses it and is printed.

    Args:
        name: the name.
        what: what it names, for the message.
        remedy: how to change it, for the message.

    Raises:
        InputError: it is empty, too long, not printable, begins with "-", or has an "@", which separates a model
            from the number of an endpoint.
    """
    fault = _fault(name, MAX_NAME_LENGTH)
    if not fault and "@" in name:
        fault = "must not have an @, which separates a model from the number of an endpoint"
    if fault:
        raise InputError(f"{what} name {_shortened(name)} {fault}{remedy and f'; {remedy}'}")


def check_path(path: str, what: str) -> None:
    """Check a path or name that a user gave.

    Raises:
        InputError: it is empty, too long, not printable, or begins with "-".
    """
    fault = _fault(path, _MAX_PATH_LENGTH)
    if fault:
        raise InputError(f"{what} {_shortened(path)} {fault}")


def _fault(text: str, max_length: int) -> str:
    if not text:
        return "must not be empty"
    if len(text) > max_length:
        return f"has {len(text):,} characters; the maximum is {max_length:,}"
    if not text.isprintable():
        return "must be printable, without control characters"
    return "must not begin with -, as options do" if text.startswith("-") else ""


def _shortened(text: str) -> str:
    """Return a text in quotes, escaped, and cut to one line."""
    return ascii(text) if len(text) <= MAX_NAME_LENGTH else f"{text[:60]!a}..."


def escape_controls(text: str) -> str:
    r"""Return a text that does nothing to a terminal: control characters are written as "\x1b".

    Line feeds and tabs stay. Marks that change the direction of text are escaped too.
    """
    return text if text.isprintable() else _UNSAFE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


def protect_cell(text: str) -> str:
    """Return the text of a CSV cell with a "'" in front where a spreadsheet would take it for a formula.

    Numbers stay as they are. `unprotect_cell` gives the text back.
    """
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def unprotect_cell(cell: str) -> str:
    """Return the text that `protect_cell` was given."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
