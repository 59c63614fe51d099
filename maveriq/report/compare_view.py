"""The comparison of two runs on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from maveriq.domain.deployment import DeploymentPlan
from maveriq.report.compare import PERCENT, QUANTITIES, Comparison, Distance, PlanPair, Quantity
from maveriq.report.curves import Curves
from maveriq.report.overlay import overlay
from maveriq.report.tables import VERDICT_STYLES, new_table
from maveriq.report.tolerances import Check
from maveriq.report.verdict import Verdict
from maveriq.report.wording import NONE, figure, gpu_list, layer_list, share, signed

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


def _verdict(name: str, verdict: Verdict) -> Text:
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
