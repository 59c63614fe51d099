"""Placements of AlpaServe's search, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from maveriq.policy.alpaserve.problem import GroupShape, Placement, PlacementProblem, SearchSettings, gpu_bytes
from maveriq.policy.alpaserve.search import FilledCandidate, PlacementSolution, SearchProgress
from maveriq.report.formatting import NONE, figure, gpu_list, share
from maveriq.report.tables import new_table
from maveriq.units import gib

_NAMES_SHOWN = 8


def placement_view(
    problem: PlacementProblem, settings: SearchSettings, solution: PlacementSolution, *, width: int
) -> Group:
    """Return the chosen groups, what they make of the requests, and the candidates.

    `width` is that of the terminal, in characters.
    """
    parts: list[RenderableType] = []
    best = solution.best
    if best is None:
        parts.append(Text.assemble(("infeasible ", "bold red"), f"{settings.policy}: {solution.reason}"))
    else:
        parts += [_groups_table(problem, settings, best), "", *_summary(problem, best)]
    if solution.candidates:
        parts += ["", _candidates_table(problem, solution, width=width)]
    parts += ["", Text(f"searched in {solution.search_s:.3f} s", style="dim")]
    return Group(*parts)


def _groups_table(problem: PlacementProblem, settings: SearchSettings, best: FilledCandidate) -> Table:
    table = new_table(
        f"{settings.policy}: {len(problem.models)} models on {problem.gpus} GPUs of "
        f"{gib(round(problem.memory_bytes)):.1f} GiB"
    )
    table.add_column("group", justify="right", style="dim")
    table.add_column("GPUs", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("GiB per GPU", justify="right", no_wrap=True)
    table.add_column("models", overflow="fold")
    first = 0
    for number, group in enumerate(best.placement, start=1):
        gpus = range(first, first := first + group.shape.gpus)
        names = " ".join(problem.models[model].name for model in group.models)
        held = f"{gib(round(gpu_bytes(group, problem))):.1f}" if group.models else NONE
        table.add_row(str(number), gpu_list(gpus), _shape(group.shape), held, Text(names or NONE))
    return table


def _summary(problem: PlacementProblem, best: FilledCandidate) -> Iterator[Text]:
    yield Text(
        f"{share(best.attainment)} of {len(problem.demand):,} requests within their SLO, mean latency "
        f"{figure(best.mean_latency_s)} s (0 where dropped), {best.replicas} replicas, score {best.score:.6f}"
    )
    missing = _left_out(best.placement, problem)
    if missing:
        names = " ".join(missing[:_NAMES_SHOWN]) + (" ..." if len(missing) > _NAMES_SHOWN else "")
        yield Text.assemble(("left out ", "bold yellow"), f"{len(missing)} of {len(problem.models)} models: {names}")


def _left_out(placement: Placement, problem: PlacementProblem) -> list[str]:
    hosted = {model for group in placement for model in group.models}
    return [spec.name for model, spec in enumerate(problem.models) if model not in hosted]


def _candidates_table(problem: PlacementProblem, solution: PlacementSolution, *, width: int) -> Table:
    """Return every candidate in the order of enumeration, the chosen one marked."""
    table = new_table(f"Candidates: {len(solution.candidates)}")
    table.add_column("#", justify="right", style="dim")
    table.add_column("groups", overflow="fold", max_width=max(20, width - 60))
    for header in ("replicas", "left out", "SLO met", "latency s", "score"):
        table.add_column(header, justify="right", no_wrap=True)
    for number, candidate in enumerate(solution.candidates, start=1):
        left_out = len(_left_out(candidate.placement, problem))
        table.add_row(
            str(number),
            _cut([group.shape for group in candidate.placement]),
            str(candidate.replicas),
            str(left_out) if left_out else NONE,
            share(candidate.attainment),
            figure(candidate.mean_latency_s),
            f"{candidate.score:.6f}",
            style="bold green" if candidate is solution.best else "",
        )
    return table


def _cut(shapes: Sequence[GroupShape]) -> str:
    """Return shapes in words, equal ones together: 4 x (TP 2 x PP 1)."""
    counted = [(shape, len(list(equal))) for shape, equal in groupby(sorted(shapes, key=lambda one: (-one.gpus, one)))]
    return ", ".join(f"{count} x ({_shape(shape)})" if count > 1 else _shape(shape) for shape, count in counted)


def _shape(shape: GroupShape) -> str:
    return f"TP {shape.tp} x PP {shape.pp}"


def progress_line(progress: SearchProgress, elapsed_s: float) -> str:
    """Return how far a search is, in a line."""
    rate = progress.requests / elapsed_s / 1e6 if elapsed_s > 0 else 0.0
    return (
        f"searching: {progress.candidates_done} of {progress.candidates} candidates filled, "
        f"{progress.simulations:,} placements simulated, {progress.requests / 1e6:,.1f} M requests "
        f"({rate:.1f} M/s), {elapsed_s:.0f} s"
    )


def placement_json(solution: PlacementSolution) -> dict[str, Any]:
    """Return a solution as plain values; figures are null where it is infeasible."""
    best = solution.best
    return {
        "feasible": solution.feasible,
        "reason": solution.reason,
        "groups": [{"tp": group.tp, "pp": group.pp, "models": list(group.models)} for group in solution.groups],
        "attainment": best.attainment if best else None,
        "score": best.score if best else None,
        "mean_latency_s": best.mean_latency_s if best else None,
        "replicas": best.replicas if best else None,
        "candidates": [
            {"attainment": candidate.attainment, "score": candidate.score} for candidate in solution.candidates
        ],
        "search_s": solution.search_s,
    }
