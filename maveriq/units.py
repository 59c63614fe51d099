"""Units: integer microseconds and bytes inside, seconds and GiB at the edges.

Every conversion between the two worlds happens here. Integers keep the clock exact: three
timeouts of 0.1 s end at the same instant as one of 0.3 s, which binary floats do not promise.
"""

import math
from typing import TypeAlias

Micros: TypeAlias = int
"""A point in simulated or real time, or a duration, in microseconds."""

Bytes: TypeAlias = int
"""An amount of memory in bytes."""

MICROS_PER_SECOND = 1_000_000
BYTES_PER_GIB = 1 << 30


def micros(seconds: float) -> Micros:
    """Return `seconds` as the nearest whole microsecond."""
    return round(seconds * MICROS_PER_SECOND)


def duration_micros(seconds: float) -> Micros:
    """Return an estimated duration, rounded up and at least 1 µs, so that time always advances."""
    # The small slack keeps 0.3 s (0.30000000000000004 after sums) from becoming 300001 µs.
    return max(1, math.ceil(seconds * MICROS_PER_SECOND - 1e-6))


def seconds(duration: Micros) -> float:
    """Return microseconds as seconds."""
    return duration / MICROS_PER_SECOND


def bytes_from_gib(gib: float) -> Bytes:
    """Return GiB as the nearest whole byte."""
    return round(gib * BYTES_PER_GIB)


def gib(amount: Bytes) -> float:
    """Return bytes as GiB."""
    return amount / BYTES_PER_GIB
