"""Bars and sparklines of text, with plain characters where a terminal knows no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text


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
