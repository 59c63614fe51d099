"""The comparison of two runs as a view."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from maveriq.domain.parallel import DeploymentPlan
from maveriq.report.compare import PERCENT, QUANTITIES, Check, Comparison, Distance, PlanPair, Quantity
from maveriq.report.curves import Curves
from maveriq.report.formatting import NONE, figure, gpu_list, layer_list, share, signed
from maveriq.report.results import SATURATION_STYLES
from maveriq.report.run_labels import short_labels
from maveriq.report.saturation import Saturation
from maveriq.report.text_plot import overlay
from maveriq.report.view import Column, Part, Row, Table, Text, View, fit_width, number_column, row, spaced

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
    "ttft-mean": "TTFT\nmean",
    "ttft-p95": "\np95",
    "tpot-mean": "TPOT\nmean",
    "itl-p95": "ITL\np95",
    "slo": "SLO\npt",
    "cost": "cost\nmean",
    "gpu-hours": "GPU h\nsum",
}
_NARROW_COLUMNS = ("mean", "p50", "p95", "p99", "queue-mean", "service-mean", "slo")
_FIRST_OF_SECTION = (
    "mean", "queue-mean", "service-mean", "ttft-mean", "tpot-mean", "itl-mean", "slo", "throughput",
)  # fmt: skip


def comparison_view(
    comparison: Comparison,
    curves: Sequence[Curves] = (),
    checks: Sequence[Check] = (),
    *,
    width: int = _WIDE,
    ascii_only: bool = False,
) -> View:
    """Return figures, errors per model, deployments, curves, saturation and tolerances.

    Args:
        comparison: of the runs.
        curves: to draw with characters, with `text_plot.dots_across(width)` points each.
        checks: of tolerances.
        width: in characters.
        ascii_only: draw with plain characters.
    """
    first, second = short_labels(comparison.labels)
    parts: list[Part] = [
        _overall_table(comparison, (first, second)),
        *fit_width(_models_table(comparison, wide=width >= _WIDE), width),
        _deployments_table(comparison.deployments, (first, second)),
        *(
            overlay(
                curve,
                rows=_CDF_ROWS if curve.log_x else _QUEUE_ROWS,
                ascii_only=ascii_only,
                names=(first, second),
            )
            for curve in curves
        ),
        _saturations(comparison, (first, second)),
    ]
    if checks:
        parts.append(checks_table(checks))
    return View(spaced(parts))


def matching_line(comparison: Comparison) -> str:
    """Return one sentence on whether requests were matched one by one, and the median error of those."""
    if comparison.unmatched:
        return f"Requests cannot be matched one by one ({comparison.unmatched}): distributions only."
    error = comparison.overall.request_error
    if error is None:
        return "Requests are matched by id, but none was completed in both runs."
    return f"Requests are matched by id: the median error of a request's latency is {error:.2g} %."


def _overall_table(comparison: Comparison, names: tuple[str, str]) -> Table:
    overall = comparison.overall
    headers = [f"{name}\n{label.kind}" for name, label in zip(names, comparison.labels, strict=True)]
    return Table(
        "All requests",
        [Column(""), *map(number_column, (*headers, "\nerror"))],
        [
            row("completed", f"{overall.sim_completed:,}", f"{overall.real_completed:,}", ""),
            *_quantity_rows(overall),
            row(
                "KS distance of latencies",
                "",
                "",
                NONE if overall.ks is None else f"{overall.ks:.3f}",
                starts_section=True,
            ),
        ],
    )


def _quantity_rows(overall: Distance) -> Iterator[Row]:
    for quantity in QUANTITIES:
        difference = overall.differences[quantity.name]
        if difference.sim is None and difference.real is None:
            continue
        formatted = figure if quantity.unit == PERCENT else share
        yield row(
            quantity.label,
            formatted(difference.sim),
            formatted(difference.real),
            signed(difference.error, quantity.unit),
            starts_section=quantity.name in _FIRST_OF_SECTION,
        )


def _models_table(comparison: Comparison, *, wide: bool) -> Table:
    by_name = {quantity.name: quantity for quantity in QUANTITIES}
    quantities = [by_name[name] for name in (_COLUMNS if wide else _NARROW_COLUMNS)]
    may_lack = ("slo", "ttft-mean", "ttft-p95", "tpot-mean", "itl-p95")
    lacking = [name for name in may_lack if comparison.overall.differences[name].error is None]
    quantities = [quantity for quantity in quantities if quantity.name not in lacking]
    headers = [_COLUMNS[quantity.name] for quantity in quantities]
    return Table(
        "Errors by model, %",
        [Column("\nmodel"), *map(number_column, headers), number_column("\nKS")],
        [
            *(row(model, *_error_cells(distance, quantities)) for model, distance in comparison.models.items()),
            row("all", *_error_cells(comparison.overall, quantities), style="bold", starts_section=True),
        ],
    )


def _error_cells(distance: Distance, quantities: Iterable[Quantity]) -> list[str]:
    errors = [signed(distance.differences[quantity.name].error) for quantity in quantities]
    return [*errors, NONE if distance.ks is None else f"{distance.ks:.3f}"]


def _deployments_table(pairs: Sequence[PlanPair], names: tuple[str, str]) -> Table:
    """Return what was deployed; where the runs differ, the plan of the second stands below that of the first."""
    columns = [
        Column("#", align="right", style="dim"),
        Column("model"),
        Column("configuration"),
        Column("layers", wrap="fold"),
        Column("GPUs"),
        Column("", wrap="words"),
    ]
    return Table("Deployments", columns, [plan_row for pair in pairs for plan_row in _plan_rows(pair, names)])


def _plan_rows(pair: PlanPair, names: tuple[str, str]) -> Iterator[Row]:
    endpoint = str(pair.endpoint_id)
    if pair.same_configuration and pair.same_gpus:
        yield row(endpoint, pair.model, *_plan_cells(pair.sim), Text("equal", "green"))
        return
    difference = "other GPUs" if pair.same_configuration else "different"
    yield row(endpoint, pair.model, *_plan_cells(pair.sim), Text(f"{difference}, {names[0]}", "yellow"))
    yield row("", "", *_plan_cells(pair.real), Text(names[1], "dim"))


def _plan_cells(plan: DeploymentPlan | None) -> tuple[str, str, str]:
    if plan is None:
        return "not deployed", NONE, NONE
    return str(plan.configuration), layer_list(plan.layer_split), gpu_list(plan.gpu_ids)


def _saturations(comparison: Comparison, names: tuple[str, str]) -> Text:
    width = max(map(len, names))
    return Text.of(
        saturation_line(names[0].ljust(width), comparison.sim_saturation),
        saturation_line(names[1].ljust(width), comparison.real_saturation),
        matching_line(comparison),
    )


def saturation_line(name: str, saturation: Saturation) -> Text:
    """Return the saturation of a run in a line."""
    style = f"bold {SATURATION_STYLES[saturation.label]}"
    return Text.of((f"{name} ", "dim"), (f"{saturation.label.value}: ", style), saturation.sentence, "\n")


def checks_table(checks: Sequence[Check]) -> Table:
    """Return how errors stand against tolerances."""
    columns = [Column("error of"), number_column(""), number_column("allowed"), Column("")]
    rows = [
        row(
            check.name,
            signed(check.error, check.unit),
            f"{check.limit:g} {check.unit}",
            Text("met", "green") if check.met else Text("MISSED", "bold red"),
        )
        for check in checks
    ]
    return Table("Tolerances", columns, rows)
