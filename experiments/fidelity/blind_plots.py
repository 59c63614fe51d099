"""Pictures of the blind runs: latencies and queue of each run, and all runs against their bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blind_plan import Bars
from blind_rows import BlindRow
from blind_tables import allowed

from maveriq.domain.records import RunRecord
from maveriq.report.compare import Comparison
from maveriq.report.compare_plot import DRAWN, REAL, SIM, TEXT, draw_curves, figure_at, headline, tidy
from maveriq.report.curves import latency_curves, queue_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 240
_DOTS_PER_INCH = 90
_BAND = "#B8D4E8"
_GALLERY = "README.md"


def draw_run(folder: Path, name: str, sim: RunRecord, recorded: RunRecord, comparison: Comparison) -> None:
    """Draw the latencies of a run and its queue over time, recorded and simulated, as `folder`/NAME.png."""
    curves = latency_curves(sim, recorded, points=_POINTS), queue_curves(sim, recorded, points=_POINTS)
    drawn = [curve for curve in curves if curve is not None]
    with figure_at(folder / f"{name}.png", inches=(10.5, 3.1), dots_per_inch=_DOTS_PER_INCH, overwrite=True) as figure:
        panels = figure.subplots(1, len(drawn), squeeze=False)[0]
        marks = [draw_curves(axes, curve) for axes, curve in zip(panels, drawn, strict=True)]
        figure.legend(marks[0], DRAWN, loc="upper right", ncols=len(DRAWN), frameon=False)
        figure.suptitle(f"{name}\n", x=0.008, ha="left", fontsize=11, fontweight="bold", parse_math=False)
        figure.text(0.008, 0.905, headline(comparison), ha="left", va="center", fontsize=8.5)


def write_gallery(folder: Path, names: Sequence[str]) -> None:
    """Write a page of all pictures that `draw_run` drew."""
    pictures = "".join(f"\n![{name}]({name}.png)\n" for name in names)
    text = f"# Recorded runs and their blind simulations\n\nWritten by `experiments/fidelity/blind.py`.\n{pictures}"
    (folder / _GALLERY).write_text(text, encoding="utf-8", newline="")


def draw_overview(path: Path, rows: Sequence[BlindRow], bars: Bars) -> None:
    """Draw mean and p95 of all runs: predicted over recorded, and the errors with the bar of each run."""
    ordered = sorted(rows, key=lambda row: row.recorded_mean_s)
    with figure_at(path, inches=(12, 6.6), dots_per_inch=100, overwrite=True) as figure:
        panels = figure.subplot_mosaic([["mean", "mean off", "p95 off"], ["p95", "mean off", "p95 off"]])
        for column, which in enumerate(("mean", "p95")):
            maximum = [allowed(row, bars)[column] for row in ordered]
            _predicted(panels[which], ordered, which, maximum)
            _errors(panels[f"{which} off"], ordered, which, maximum, named=column == 0)
        figure.legend(
            handles=[_mark("s", _BAND, "what the run's bar allows"), *(_mark(*_looks(ours)) for ours in (True, False))],
            loc="outside upper right",
            ncols=3,
            frameon=False,
        )
        figure.suptitle(f"{len(rows)} recorded runs, simulated blind", x=0.01, ha="left", fontweight="bold")


def _predicted(axes: Axes, rows: Sequence[BlindRow], which: str, maximum: Sequence[float]) -> None:
    recorded, sim = ([float(getattr(row, f"{kind}_{which}_s")) for row in rows] for kind in ("recorded", "sim"))
    ends = min(recorded) / 1.6, max(recorded) * 1.6
    axes.plot(ends, ends, color=TEXT, linewidth=0.8, zorder=1)
    low, high = ([at * (1 + sign * off / 100) for at, off in zip(recorded, maximum, strict=True)] for sign in (-1, 1))
    axes.vlines(recorded, low, high, color=_BAND, linewidth=7, zorder=2)
    _dots(axes, rows, recorded, sim)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(ends)
    axes.set_ylim(ends)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(f"{which} latency", loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("recorded, s")
    axes.set_ylabel("simulated, s")
    tidy(axes)


def _errors(axes: Axes, rows: Sequence[BlindRow], which: str, maximum: Sequence[float], *, named: bool) -> None:
    places = list(range(len(rows)))
    axes.hlines(places, [-off for off in maximum], maximum, color=_BAND, linewidth=8, zorder=2)
    axes.axvline(0, color=TEXT, linewidth=0.8, zorder=3)
    _dots(axes, rows, [float(getattr(row, f"{which}_error")) for row in rows], places)
    axes.set_yticks(places, [row.run for row in rows] if named else [""] * len(rows), fontsize=7.5)
    axes.set_title(f"error of the {which}, %", loc="left", fontsize=10, fontweight="bold")
    tidy(axes)


def _dots(axes: Axes, rows: Sequence[BlindRow], x: Sequence[float], y: Sequence[float]) -> None:
    for ours in (True, False):
        marker, colour, _ = _looks(ours)
        chosen = [place for place, row in enumerate(rows) if _of_maveriq(row) == ours]
        axes.scatter([x[at] for at in chosen], [y[at] for at in chosen], marker=marker, color=colour, s=22, zorder=4)


def _of_maveriq(row: BlindRow) -> bool:
    return row.run.startswith("MaverIQ")


def _looks(ours: bool) -> tuple[str, str, str]:  # noqa: FBT001
    """Return marker, colour and name of MaverIQ's runs, or of the others."""
    return ("o", SIM, "MaverIQ") if ours else ("D", REAL, "AlpaServe and AlpaServe*")


def _mark(marker: str, colour: str, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], marker=marker, color=colour, linestyle="", label=label)
