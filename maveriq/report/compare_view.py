"""Two curves over one another in characters: the real run as a dotted area, the simulated one as a line.

A cell of braille has two dots across and four down. The shapes differ, not the colours alone, so
that the picture reads the same without colour. Where a terminal knows no braille, `:` and `*` serve.

The comparison of two runs on a terminal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from maveriq.domain.parallel import DeploymentPlan
from maveriq.report.compare import PERCENT, QUANTITIES, Check, Comparison, Distance, PlanPair, Quantity
from maveriq.report.curves import Curves
from maveriq.report.formatting import NONE, figure, gpu_list, layer_list, share, signed
from maveriq.report.saturation import Saturation
from maveriq.report.tables import VERDICT_STYLES, new_table

Array: TypeAlias = npt.NDArray[Any]

SIM_STYLE, REAL_STYLE = "bold cyan", "yellow"
_BRAILLE = 0x2800
# The bit of each dot in a cell of braille, by row and column.
_BITS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
_LABEL_WIDTH = 7


def dots_across(width: int) -> int:
    """Return how many points a picture of so many characters can show."""
    return 2 * max(8, width - _LABEL_WIDTH - 1)


def overlay(curves: Curves, *, rows: int, ascii_only: bool) -> Text:
    """Return the picture: a title with its key, the plot, an axis.

    Args:
        curves: with `dots_across(width)` points.
        rows: lines of the plot itself.
        ascii_only: use no braille and no line characters.
    """
    sim, real = (_heights(values, curves.top, rows) for values in (curves.sim, curves.real))
    text = _heading(curves, ascii_only=ascii_only)
    cells = zip(_cells(_line(sim, rows)), _cells(_area(real, rows)), strict=True)
    for row, (line, area) in enumerate(cells):
        text.append(_label(curves, row, rows).rjust(_LABEL_WIDTH), style="dim")
        text.append("|" if ascii_only else "│", style="dim")
        for bits_of_line, bits_of_area in zip(line.tolist(), area.tolist(), strict=True):
            style = SIM_STYLE if bits_of_line else REAL_STYLE
            text.append(_glyph(bits_of_line, bits_of_area, ascii_only=ascii_only), style=style)
        text.append("\n")
    text.append(_axis(curves, len(sim) // 2, ascii_only=ascii_only), style="dim")
    return text


def _heading(curves: Curves, *, ascii_only: bool) -> Text:
    line, area = ("**", "::") if ascii_only else ("⣀⡠⠤⠒⠉", "⡂⡂⡂")
    return Text.assemble(
        (curves.title, "bold"),
        f" ({curves.x_label})  ",
        (line, SIM_STYLE),
        " simulated  ",
        (area, REAL_STYLE),
        " real\n",
    )


def _glyph(line: int, area: int, *, ascii_only: bool) -> str:
    if ascii_only:
        return "*" if line else ":" if area else " "
    return chr(_BRAILLE | (line or area)) if line or area else " "


def _heights(values: Array, top: float, rows: int) -> Array:
    """Return the dot, from 0 at the bottom, that each value lies on; -1 for nothing at all."""
    heights: Array = np.ceil(np.clip(values / top, 0, 1) * 4 * rows).astype(int) - 1
    return heights


def _line(heights: Array, rows: int) -> Array:
    """Return the dots of a line through all heights, top row first."""
    levels = np.arange(4 * rows)[:, None]
    shown = np.maximum(heights, 0)  # a line at nothing runs along the bottom
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
    """Return what stands beside the top, the middle and the bottom row."""
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


_WIDE = 110
_CDF_ROWS, _QUEUE_ROWS = 10, 6

# Headers of the errors per model, by the name of the quantity, and which of them a narrow terminal shows.
_COLUMNS = {
    "mean": "latency\nmean",
    "p50": "\np50",
    "p95": "\np95",
    "p99": "\np99",
    "queue-mean": "queue\nmean",
    "queue-p95": "\np95",
    "service-mean": "service\nmean",
    "service-p50": "\np50",
    "slo": "SLO\npt",
    "cost": "cost\nmean",
    "gpu-hours": "GPU h\nsum",
}
_NARROW_COLUMNS = ("mean", "p50", "p95", "p99", "queue-mean", "service-mean", "slo")
_FIRST_OF_SECTION = ("mean", "queue-mean", "service-mean", "slo", "throughput")


def comparison_view(
    comparison: Comparison, curves: Sequence[Curves], checks: Sequence[Check], *, width: int, ascii_only: bool
) -> Group:
    """Return everything: figures, errors per model, plans, curves, verdicts, tolerances.

    Args:
        comparison: of the runs.
        curves: with `overlay.dots_across(width)` points each.
        checks: on tolerances; none where the user gave none.
        width: of the terminal.
        ascii_only: draw with plain characters.
    """
    pictures = (overlay(one, rows=_CDF_ROWS if one.log_x else _QUEUE_ROWS, ascii_only=ascii_only) for one in curves)
    parts: list[RenderableType] = [
        _overall_table(comparison),
        _models_table(comparison, wide=width >= _WIDE),
        _plans_table(comparison.deployments),
        *pictures,
        _verdicts(comparison),
    ]
    if checks:
        parts.append(_checks(checks))
    return Group(*(piece for part in parts for piece in (part, "")))


def matching_line(comparison: Comparison) -> str:
    """Return one sentence on whether requests could be matched one by one, and what came of it."""
    if comparison.unmatched:
        return f"Requests cannot be matched one by one ({comparison.unmatched}): distributions only."
    error = comparison.overall.request_error
    if error is None:
        return "Requests are matched by id, but none was completed in both runs."
    return f"Requests are matched by id: the median error of a request's latency is {error:.2g} %."


def _overall_table(comparison: Comparison) -> Table:
    overall = comparison.overall
    table = new_table("All requests")
    table.add_column("", no_wrap=True)
    for header in ("simulated", "real", "error"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_row("completed", f"{overall.sim_completed:,}", f"{overall.real_completed:,}", "")
    for one in QUANTITIES:
        difference = overall.differences[one.name]
        if difference.sim is None and difference.real is None:
            continue
        if one.name in _FIRST_OF_SECTION:
            table.add_section()
        told = share if one.unit != PERCENT else figure
        table.add_row(one.label, told(difference.sim), told(difference.real), signed(difference.error, one.unit))
    table.add_section()
    table.add_row("KS distance of latencies", "", "", NONE if overall.ks is None else f"{overall.ks:.3f}")
    return table


def _models_table(comparison: Comparison, *, wide: bool) -> Table:
    known = {one.name: one for one in QUANTITIES}
    shown = [known[name] for name in (_COLUMNS if wide else _NARROW_COLUMNS)]
    if comparison.overall.differences["slo"].error is None:
        shown.remove(known["slo"])
    table = new_table("Errors by model, %")
    table.add_column("\nmodel", overflow="fold")
    for one in shown:
        table.add_column(_COLUMNS[one.name], justify="right", no_wrap=True)
    table.add_column("\nKS", justify="right", no_wrap=True)
    for model, distance in comparison.models.items():
        table.add_row(Text(model), *_error_cells(distance, shown))
    table.add_section()
    table.add_row("all", *_error_cells(comparison.overall, shown), style="bold")
    return table


def _error_cells(distance: Distance, quantities: Iterable[Quantity]) -> list[str]:
    errors = [signed(distance.differences[one.name].error) for one in quantities]
    return [*errors, NONE if distance.ks is None else f"{distance.ks:.3f}"]


def _plans_table(pairs: Sequence[PlanPair]) -> Table:
    """Return what was deployed; where the runs differ, the real one stands below the simulated one."""
    table = new_table("Deployments")
    table.add_column("#", justify="right", style="dim", no_wrap=True)
    table.add_column("model", no_wrap=True)
    table.add_column("configuration", no_wrap=True)
    table.add_column("layers", overflow="fold")
    table.add_column("GPUs", no_wrap=True)
    table.add_column("", no_wrap=True)
    for pair in pairs:
        who = (str(pair.endpoint_id), Text(pair.model))
        if pair.same_configuration and pair.same_gpus:
            table.add_row(*who, *_plan_cells(pair.sim), Text("equal", style="green"))
            continue
        what = "other GPUs" if pair.same_configuration else "different"
        table.add_row(*who, *_plan_cells(pair.sim), Text(f"{what}, simulated", style="yellow"))
        table.add_row("", "", *_plan_cells(pair.real), Text("real", style="dim"))
    return table


def _plan_cells(plan: DeploymentPlan | None) -> tuple[str, str, str]:
    if plan is None:
        return "not deployed", NONE, NONE
    return str(plan.configuration), layer_list(plan.layer_split), gpu_list(plan.gpu_ids)


def _verdicts(comparison: Comparison) -> Text:
    told = Text()
    for name, verdict in (("simulated", comparison.sim_verdict), ("real", comparison.real_verdict)):
        told.append_text(_verdict(name, verdict))
    told.append(matching_line(comparison))
    return told


def _verdict(name: str, verdict: Saturation) -> Text:
    style = f"bold {VERDICT_STYLES[verdict.label]}"
    return Text.assemble((f"{name:9} ", "dim"), (f"{verdict.label.value}: ", style), verdict.sentence, "\n")


def _checks(checks: Sequence[Check]) -> Table:
    table = new_table("Tolerances")
    table.add_column("error of", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("allowed", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for one in checks:
        outcome = Text("met", style="green") if one.met else Text("MISSED", style="bold red")
        table.add_row(one.name, signed(one.error, one.unit), f"{one.limit:g} {one.unit}", outcome)
    return table
