"""What a study leaves, as data: a table, the panels of its plot, and its figures beside published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

import numpy as np

Cell: TypeAlias = str | int | float | None
"""A cell of a table: text, a count, a number, or nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyTable:
    """A table with a header; `rows` have a cell for each column."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


class Mark(StrEnum):
    """How a series is drawn."""

    LINE = "line"
    POINTS = "points"
    BARS = "bars"


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Values that belong together; `x` has names where the series is drawn as bars."""

    label: str
    x: Sequence[float] | Sequence[str]
    y: Sequence[float]
    mark: Mark = Mark.LINE


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One diagram of a plot; `level` is the height of a dashed line to compare with, such as a ratio of 1."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    level: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyResult:
    """The outcome of a study.

    Args:
        table: its rows.
        panels: its plot, top to bottom.
        figures: single numbers by name, such as `latency-median`, to compare with published ones.
        notes: what a reader must know to read the table, a sentence each.
    """

    table: StudyTable
    panels: tuple[Panel, ...]
    figures: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def percentage_errors(estimated: Sequence[float], measured: Sequence[float]) -> np.ndarray:
    """Return absolute percentage errors."""
    return np.asarray(100 * np.abs(np.asarray(estimated) / np.asarray(measured) - 1))
