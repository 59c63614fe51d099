"""Medians of measured ratios: what most studies show."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

import numpy as np

from maveriq.calibration.measurements import Measurement

Key = TypeVar("Key", bound=Hashable)

DECIMALS = 4
"""Decimals of ratios in tables."""


def grouped(items: Iterable[Measurement], key: Callable[[Measurement], Key]) -> dict[Key, list[Measurement]]:
    """Return runs by a key, in the order in which the keys occur."""
    found: dict[Key, list[Measurement]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def ratios_to(
    runs: Iterable[Measurement], base: Mapping[Key, Measurement], key: Callable[[Measurement], Key]
) -> list[tuple[Measurement, float, float]]:
    """Return the runs that have a base of the same key, each with its latency and its memory over those of the base."""
    return [
        (run, run.latency_s / base[key(run)].latency_s, run.memory_gib / base[key(run)].memory_gib)
        for run in runs
        if key(run) in base
    ]


def median(values: Iterable[float]) -> float:
    """Return the median, rounded as tables are."""
    return round(float(np.median(list(values))), DECIMALS)
