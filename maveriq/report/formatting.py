"""Formats numbers, durations and short lists, and draws bars and sparklines in characters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.text import Text

NONE = "–"
"""Where there is nothing to show."""


def figure(value: float | None) -> str:
    """Return a number to about three digits: 0.0123, 1.23, 12.3, 1,234."""
    if value is None:
        return NONE
    size = abs(value)
    if size == 0 or size >= 100:
        return f"{value:,.0f}"
    if size < 0.1:
        return f"{value:.2g}" if size < 0.001 else f"{value:.4f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def share(value: float | None) -> str:
    """Return a share as a percentage: 100 % only where nothing is missing, 0 % only where nothing is there."""
    if value is None:
        return NONE
    percent = 100 * value
    if 0 < percent < 0.05:
        return "<0.1 %"
    return f"{percent:.0f} %" if percent in (0, 100) else f"{min(percent, 99.9):.1f} %"


def signed(error: float | None, unit: str = "") -> str:
    """Return an error with its sign and unit: +1.2 %, -0.03 pt, 0 %."""
    if error is None:
        return NONE
    size = abs(error)
    decimals = 0 if size >= 100 else 1 if size >= 1 else 2
    number = "0" if size < 0.005 else f"{error:+,.{decimals}f}"
    return f"{number} {unit}" if unit else number


def clock(duration_s: float) -> str:
    """Return a duration as 4:05 or 1:04:05."""
    minutes, seconds = divmod(int(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def gpu_list(gpu_ids: Iterable[int]) -> str:
    """Return GPU ids in ascending order, runs of them shortened: 0-3 6."""
    runs: list[list[int]] = []
    for gpu_id in sorted(gpu_ids):
        if runs and gpu_id == runs[-1][1] + 1:
            runs[-1][1] = gpu_id
        else:
            runs.append([gpu_id, gpu_id])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def layer_list(layer_split: Sequence[int]) -> str:
    """Return the layers of each stage, an even split of several stages shortened: 4 x 20."""
    if len(layer_split) > 1 and len(set(layer_split)) == 1:
        return f"{len(layer_split)} x {layer_split[0]}"
    return " ".join(map(str, layer_split))


@dataclass(frozen=True, slots=True, kw_only=True)
class Glyphs:
    """The characters to draw with; `levels` ascend, the first means nothing at all."""

    full: str
    empty: str
    levels: str


UNICODE = Glyphs(full="━", empty="━", levels=" ▁▂▃▄▅▆▇█")
ASCII = Glyphs(full="#", empty="-", levels=" .:-=+*#@")


def bar(share: float, *, width: int, style: str, glyphs: Glyphs) -> Text:
    """Return a bar of which `share` (0 to 1) is filled; any share above 0 shows."""
    filled = round(min(max(share, 0.0), 1.0) * width)
    filled = max(filled, 1) if share > 0 else filled
    return Text.assemble((glyphs.full * filled, style), (glyphs.empty * (width - filled), "bright_black"))


def sparkline(values: Sequence[int], *, glyphs: Glyphs) -> str:
    """Return a character per value, the largest as the highest; any value above 0 shows."""
    top, steps = max(values, default=0), len(glyphs.levels) - 1
    if not top:
        return glyphs.levels[0] * len(values)
    return "".join(glyphs.levels[-(-value * steps // top)] for value in values)


def level_style(share: float) -> str:
    """Return green, yellow or red for a load."""
    if share >= 0.9:
        return "red"
    return "yellow" if share >= 0.7 else "green"
