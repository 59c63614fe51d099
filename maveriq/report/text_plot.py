"""Two curves over one another in characters: the second run as a dotted area, the first one as a line.

A cell of braille has two dots across and four down. Line and area differ in shape and not only in
colour, so the picture also reads without colour. Terminals without braille get `:` and `*`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maveriq.report.curves import Curves
from maveriq.report.formatting import figure
from maveriq.report.view import Text

Array: TypeAlias = npt.NDArray[Any]

SIM_STYLE, REAL_STYLE = "bold cyan", "yellow"
_BRAILLE = 0x2800
# The bit of each dot in a cell of braille, by row and column.
_BITS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
_LABEL_WIDTH = 7


def dots_across(width: int) -> int:
    """Return how many points a picture of so many characters can show."""
    return 2 * max(8, width - _LABEL_WIDTH - 1)


def overlay(curves: Curves, *, rows: int, ascii_only: bool, names: tuple[str, str] = ("first", "second")) -> Text:
    """Return the picture: a title with its key, the plot, an axis.

    Args:
        curves: with `dots_across(width)` points.
        rows: lines of the plot itself.
        ascii_only: use no braille and no line characters.
        names: short names of both runs, for the key.
    """
    sim, real = (_heights(values, curves.top, rows) for values in (curves.sim, curves.real))
    parts: list[str | tuple[str, str] | Text] = [_heading(curves, names, ascii_only=ascii_only)]
    cells = zip(_cells(_line(sim, rows)), _cells(_area(real, rows)), strict=True)
    for row, (line, area) in enumerate(cells):
        parts.append((_label(curves, row, rows).rjust(_LABEL_WIDTH), "dim"))
        parts.append(("|" if ascii_only else "│", "dim"))
        for bits_of_line, bits_of_area in zip(line.tolist(), area.tolist(), strict=True):
            style = SIM_STYLE if bits_of_line else REAL_STYLE
            parts.append((_glyph(bits_of_line, bits_of_area, ascii_only=ascii_only), style))
        parts.append("\n")
    return Text.of(*parts, (_axis(curves, len(sim) // 2, ascii_only=ascii_only), "dim"))


def _heading(curves: Curves, names: tuple[str, str], *, ascii_only: bool) -> Text:
    line, area = ("**", "::") if ascii_only else ("⣀⡠⠤⠒⠉", "⡂⡂⡂")
    return Text.of(
        (curves.title, "bold"),
        f" ({curves.x_label})\n{' ' * (_LABEL_WIDTH + 1)}",
        (line, SIM_STYLE),
        f" {names[0]}  ",
        (area, REAL_STYLE),
        f" {names[1]}\n",
    )


def _glyph(line: int, area: int, *, ascii_only: bool) -> str:
    if ascii_only:
        return "*" if line else ":" if area else " "
    return chr(_BRAILLE | (line or area)) if line or area else " "


def _heights(values: Array, top: float, rows: int) -> Array:
    """Return the dot that each value lies on, counted from 0 at the bottom; -1 for zero."""
    heights: Array = np.ceil(np.clip(values / top, 0, 1) * 4 * rows).astype(int) - 1
    return heights


def _line(heights: Array, rows: int) -> Array:
    """Return the dots of a line through all heights, top row first."""
    levels = np.arange(4 * rows)[:, None]
    shown = np.maximum(heights, 0)  # a line at zero runs along the bottom
    before = np.concatenate((shown[:1], shown[:-1]))
    # A step is drawn whole, in the column where it arrives.
    low = np.where(before < shown, np.minimum(before + 1, shown), shown)
    high = np.where(before > shown, np.maximum(before - 1, shown), shown)
    dots: Array = ((levels >= low) & (levels <= high))[::-1]
    return dots


def _area(heights: Array, rows: int) -> Array:
    """Return the dots of a thinly dotted area below all heights, with a closed upper edge."""
    levels, across = np.arange(4 * rows)[:, None], np.arange(len(heights))[None, :]
    thin = (across % 2 == 0) & (levels % 2 == 0)
    dots: Array = ((levels <= heights) & thin)[::-1]
    return dots


def _cells(dots: Array) -> Iterator[Array]:
    """Yield the braille bits of each row of cells."""
    rows, columns = dots.shape[0] // 4, dots.shape[1] // 2
    blocks = dots.reshape(rows, 4, columns, 2) * _BITS[None, :, None, :]
    yield from blocks.sum(axis=(1, 3))


def _label(curves: Curves, row: int, rows: int) -> str:
    """Return the label of the top, the middle and the bottom row; other rows have none."""
    for at, value in ((0, curves.top), (rows // 2, curves.top / 2), (rows - 1, 0.0)):
        if row == at:
            return f"{100 * value:.0f} % " if curves.log_x else f"{value:,.4g} "
    return ""


def _axis(curves: Curves, width: int, *, ascii_only: bool) -> str:
    """Return the line below the plot, with ticks, and the numbers at them."""
    rule, tick, corner = ("-", "+", "+") if ascii_only else ("─", "┬", "└")
    line, labels = [rule] * width, [" "] * (width + _LABEL_WIDTH + 1)
    taken = 0
    for value in curves.ticks():
        at = _column(curves, value, width)
        label = f"{figure(value) if value < 1 else f'{value:,.0f}'}"
        start = at + _LABEL_WIDTH + 1 - len(label) // 2
        if start < taken or start + len(label) > len(labels):
            continue
        line[at] = tick
        labels[start : start + len(label)] = label
        taken = start + len(label) + 1
    return " " * _LABEL_WIDTH + corner + "".join(line) + "\n" + "".join(labels).rstrip()


def _column(curves: Curves, value: float, width: int) -> int:
    low, high, at = float(curves.x[0]), float(curves.x[-1]), value
    if curves.log_x:
        low, high, at = math.log(low), math.log(high), math.log(value)
    return min(width - 1, round((at - low) / (high - low) * (width - 1)))
