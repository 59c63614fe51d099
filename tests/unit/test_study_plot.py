"""Plots of studies read without colour."""

from itertools import pairwise

from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from maveriq.study import plot
from maveriq.study.result import Mark, Panel, Series

NAMES = "abcdefgh"


def panel(mark: Mark) -> Panel:
    x: list[float] | list[str] = ["p", "q"] if mark is Mark.BARS else [1.0, 2.0]
    series = tuple(Series(label=name, x=x, y=[1.0, 2.0], mark=mark) for name in NAMES)
    return Panel(title="t", x_label="x", y_label="y", series=series)


def axes_of(mark: Mark):
    axes = Figure().subplots()
    plot._draw_panel(axes, panel(mark))
    return axes


def test_lines_differ_in_mark_and_dash() -> None:
    looks = {(line.get_marker(), str(line._unscaled_dash_pattern)) for line in axes_of(Mark.LINE).lines}
    assert len(looks) == len(NAMES)


def test_points_differ_in_mark() -> None:
    assert len({line.get_marker() for line in axes_of(Mark.POINTS).lines}) == len(NAMES)


def test_bars_differ_in_hatch_and_do_not_overlap() -> None:
    bars = axes_of(Mark.BARS).patches
    assert len({bar.get_hatch() for bar in bars}) == len(NAMES)
    at_first = sorted((bar.get_x(), bar.get_width()) for bar in bars if bar.get_x() < 0.5)
    assert all(x + width <= following + 1e-9 for (x, width), (following, _) in pairwise(at_first))


def test_colours_are_of_the_palette_for_the_colour_blind() -> None:
    used = {to_hex(line.get_color()).upper() for line in axes_of(Mark.LINE).lines}
    assert used <= {colour.upper() for colour in plot.COLOURS}
    assert len(used) == len(NAMES)
