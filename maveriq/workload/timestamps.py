"""Dates with times of day, as traces have them, in nanoseconds since 1970."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

NS_PER_MINUTE = 60 * 10**9

# Between these years nanoseconds fit into 64 bits.
_TIMESTAMP = re.compile(
    r"((?:19[7-9]\d|20\d\d|21\d\d|22[0-5]\d)-\d\d-\d\d)[ Tt](\d\d:\d\d:\d\d(?:\.\d{1,9})?)"
    r" ?(?:[Zz]|UTC|GMT|([+-])([01]\d|2[0-3])(?::?([0-5]\d))?)?",
    re.ASCII,
)
_MANY_OF_UTC = re.compile(
    r"(?:(?:19[7-9]\d|20\d\d|21\d\d|22[0-5]\d)-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,9})?\n)*", re.ASCII
)
_UTC = ("+00:00", "Z")


def timestamps_ns(cells: Sequence[str]) -> np.ndarray[Any, Any]:
    """Return dates with times of day as nanoseconds since 1970; without an offset they are UTC.

    Raises:
        ValueError: a text is no such date.
    """
    suffix = next((utc for utc in _UTC if cells[0].endswith(utc)), "")
    plain = [cell.removesuffix(suffix) for cell in cells] if suffix else cells
    if _MANY_OF_UTC.fullmatch("\n".join(plain) + "\n"):  # the usual case, at a third of the time
        return np.array(plain, "datetime64[ns]").astype(np.int64)
    local, offsets = [], []
    for cell in cells:
        found = _TIMESTAMP.fullmatch(cell.strip())
        if found is None:
            raise ValueError(f"{cell!r} is not a date and time")
        day, time, sign, hours, minutes = found.groups()
        local.append(f"{day}T{time}")
        offset = int(hours) * 60 + int(minutes or 0) if sign else 0
        offsets.append(-offset if sign == "-" else offset)
    return np.array(local, "datetime64[ns]").astype(np.int64) - np.array(offsets, np.int64) * NS_PER_MINUTE
