"""The comparison of two runs as an image, PNG or SVG by the name of the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maveriq.errors import InputError
from maveriq.files import check_file_writable, written_whole
from maveriq.report.compare import PERCENT, Comparison
from maveriq.report.curves import Curves
from maveriq.report.formatting import signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
_PLOT = "plot"
POINTS = 1200
DRAWN = ("simulated", "recorded")
"""What `draw_curves` returns the marks of, for the legend of a simulation against a recording."""

# Of the palette by Okabe and Ito, which colour-blind readers tell apart.
SIM, REAL, AREA, TEXT, GRID = "#0072B2", "#D55E00", "#F7D9BF", "#333333", "#E4E4E4"


def check_plot(path: Path, *, overwrite: bool) -> None:
    """Check the file of a plot before any work.

    Raises:
        InputError: neither PNG nor SVG, or it is there already and may not be replaced.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"plot {str(path)!r} must end in {' or '.join(FORMATS)}")
    check_file_writable(path, what=_PLOT, overwrite=overwrite)


def write_plot(
    path: Path, comparison: Comparison, curves: list[Curves], *, title: str, overwrite: bool = False
) -> None:
    """Draw the curves one above the other; see `figure_at`.

    Args:
        path: the file.
        comparison: whose headline figures stand below the title.
        curves: what to draw.
        title: the names of the runs.
        overwrite: replace a file that is there.

    Raises:
        InputError: as for `check_plot`, or the place cannot be written to.
        MaveriqError: the disk is full.
    """
    title = title.encode(errors="replace").decode()  # a path may hold bytes that are no text
    with figure_at(path, inches=_inches(curves), overwrite=overwrite) as figure:
        _draw(figure, comparison, curves, title=title)


def comparison_figure(comparison: Comparison, curves: list[Curves], *, title: str) -> Figure:
    """Return the plot of `write_plot` as a matplotlib figure, for notebooks."""
    from maveriq.report.figure import NotebookFigure

    figure = NotebookFigure(figsize=_inches(curves), layout="constrained")
    _draw(figure, comparison, curves, title=title)
    return figure


def _inches(curves: list[Curves]) -> tuple[float, float]:
    return 9, 3.1 * len(curves) + 0.7


def _draw(figure: Figure, comparison: Comparison, curves: list[Curves], *, title: str) -> None:
    for axes, curve in zip(figure.subplots(len(curves), squeeze=False)[:, 0], curves, strict=True):
        place = "lower right" if curve.log_x else "upper right"
        axes.legend(draw_curves(axes, curve), list(map(str, comparison.labels)), frameon=False, loc=place)
    figure.suptitle(f"{title}\n\n", x=0.01, ha="left", fontsize=12, fontweight="bold", parse_math=False)
    figure.text(0.01, 0.944, headline(comparison), ha="left", va="center", fontsize=9.5)


@contextmanager
def figure_at(
    path: Path,
    *,
    inches: tuple[float, float],
    dots_per_inch: int = 150,
    overwrite: bool = False,
    also: Sequence[Path] = (),
) -> Iterator[Figure]:
    """Give an empty figure in the style of all plots, and write it unless an error came.

    The file appears whole or not at all, the same figure giving the same bytes. `also` gets it in other formats.

    Raises:
        InputError: as for `check_plot`, or the place cannot be written to.
        MaveriqError: the disk is full.
    """
    for file in (path, *also):
        check_plot(file, overwrite=overwrite)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {"svg.hashsalt": "maveriq", "svg.fonttype": "path", "font.size": 10, "text.color": TEXT}
    with mpl.rc_context(style):
        figure = Figure(figsize=inches, layout="constrained")
        yield figure
        for file in (path, *also):
            kind = file.suffix.lower().removeprefix(".")
            metadata: Any = {"Software": "maveriq"} if kind == "png" else {"Date": None, "Creator": "maveriq"}
            with written_whole(file, what=_PLOT, overwrite=overwrite) as partial:
                figure.savefig(partial, format=kind, dpi=dots_per_inch, metadata=metadata)
            figure.set_layout_engine("none")  # what is laid out stays so: this takes as long as drawing


def draw_curves(axes: Axes, curves: Curves) -> tuple[Any, Any]:
    """Draw the first run as a line and the second one as an area, as the terminal does; return both, see DRAWN."""
    from matplotlib.ticker import NullLocator

    x: Any = curves.x
    area = axes.fill_between(x, curves.real, step="pre", facecolor=AREA, edgecolor=REAL, linewidth=0.8)
    (line,) = axes.plot(x, curves.sim, color=SIM, linewidth=1.3 if curves.log_x else 0.9, drawstyle="steps-pre")
    if curves.log_x:
        axes.set_xscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xticks(curves.ticks(), [f"{tick:,g}" for tick in curves.ticks()])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(float(x[0]), float(x[-1]))
    axes.set_ylim(0, curves.top * 1.03)
    axes.set_title(curves.title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(f"{'latency' if curves.log_x else 'time'}, {curves.x_label}")
    tidy(axes)
    return line, area


def tidy(axes: Axes) -> None:
    """Leave of an axes what is read: a pale grid behind the data, and two of its four sides."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=TEXT, labelcolor=TEXT)


def headline(comparison: Comparison) -> str:
    """Return the errors that matter most, in one line."""
    overall = comparison.overall
    parts = [
        f"{label} {signed(overall.differences[name].error, PERCENT)}"
        for label, name in (("latency: mean", "mean"), ("p50", "p50"), ("p95", "p95"), ("p99", "p99"))
    ]
    if overall.ks is not None:
        parts.append(f"KS distance {overall.ks:.3f}")
    if overall.request_error is not None:
        parts.append(f"median error per request {overall.request_error:.1f} %")
    return "   ".join(parts)
