"""requests.csv read fast, a chunk of rows at a time, where all in it is as maveriq writes it.

Anything else makes it give up; `reading` then goes row by row, which is slower but names the fault.
"""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maveriq.domain.records import NOT_YET, REQUEST_COLUMNS
from maveriq.units import MICROS_PER_SECOND

Array: TypeAlias = npt.NDArray[Any]

_ROWS_AT_ONCE = 256  # more at once are slower: they leave the processor's cache
_MOST_DIGITS = 15

# Beside these, `deployment_id` and `slo_s` may be empty and are then 0.
_COUNTS = ("request_id", "prompt_tokens", "output_tokens")
_TIMES = ("arrival_s", "start_s", "first_token_s", "finish_s")

LONGEST_S = 9e9
"""285 years: the microseconds of any shorter time are exact in a float."""


def read_columns(path: Path, texts: Mapping[str, Mapping[str, int]]) -> dict[str, Array] | None:
    """Return the columns of requests.csv as int64, times in microseconds; None where anything is unusual.

    Args:
        path: the file.
        texts: the number of each known text, for each column of texts.
    """
    found: dict[str, array[int]] = {name: array("q") for name in (*_COUNTS, *_TIMES, "deployment_id", "slo_s", *texts)}
    try:
        for cells in _chunks(path):
            for name in _COUNTS:
                found[name].frombytes(_counts(cells[name]).tobytes())
            if "0" in cells["deployment_id"]:  # none is said by an empty cell
                return None
            found["deployment_id"].frombytes(_counts([cell or "0" for cell in cells["deployment_id"]]).tobytes())
            for name, absent in (*((name, NOT_YET) for name in _TIMES), ("slo_s", 0)):
                found[name].frombytes(_micros(cells[name], absent).tobytes())
            for name, numbers in texts.items():
                found[name].extend(map(numbers.__getitem__, cells[name]))
    except (OSError, ValueError, KeyError, OverflowError, csv.Error):
        return None
    return {name: np.frombuffer(values, dtype=np.int64) for name, values in found.items() if values}


def _chunks(path: Path) -> Iterator[dict[str, Sequence[str]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        if tuple(next(rows, ())) != REQUEST_COLUMNS:
            raise ValueError("other columns")
        while chunk := list(islice(rows, _ROWS_AT_ONCE)):
            columns = list(zip(*chunk, strict=True))
            if len(columns) != len(REQUEST_COLUMNS):
                raise ValueError("other numbers of cells")
            yield dict(zip(REQUEST_COLUMNS, columns, strict=True))


def _counts(cells: Sequence[str]) -> Array:
    joined = "".join(cells)
    if (
        not (joined.isascii() and joined.isdigit())
        or not 0 < len(min(cells, key=len)) <= len(max(cells, key=len)) <= _MOST_DIGITS
    ):
        raise ValueError("not whole numbers")
    return np.fromiter(map(int, cells), dtype=np.int64, count=len(cells))


def _micros(cells: Sequence[str], absent: int) -> Array:
    """Return seconds as whole microseconds, `absent` where a cell is empty."""
    empty = np.fromiter((not cell for cell in cells), dtype=bool, count=len(cells))
    seconds = np.fromiter((float(cell or 0) for cell in cells), dtype=np.float64, count=len(cells))
    if not ((seconds >= 0) & (seconds <= LONGEST_S)).all():
        raise ValueError("not times")
    micros: Array = np.rint(seconds * MICROS_PER_SECOND).astype(np.int64)
    micros[empty] = absent
    return micros
