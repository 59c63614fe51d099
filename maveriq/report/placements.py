"""Placements of AlpaServe's search, as a view and as JSON values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from maveriq.policy.alpaserve.problem import GroupShape, Placement, PlacementProblem, SearchSettings, gpu_bytes
from maveriq.policy.alpaserve.search import FilledCandidate, PlacementSolution, SearchProgress
from maveriq.report.formatting import NONE, figure, gpu_list, share
from maveriq.report.results import WIDE
from maveriq.report.view import BLANK, Column, Part, Row, Table, Text, View, number_column, row
from maveriq.units import gib

_MAX_NAMES = 8


def placement_view(
    problem: PlacementProblem, settings: SearchSettings, solution: PlacementSolution, *, width: int = WIDE
) -> View:
    """Return the chosen groups, how they serve the requests, and the candidates; `width` is in characters."""
    parts: list[Part] = []
    best = solution.best
    if best is None:
        parts.append(Text.of(("infeasible ", "bold red"), f"{settings.policy}: {solution.reason}"))
    else:
        parts += [_groups_table(problem, settings, best), BLANK, *_summary(problem, best)]
    if solution.candidates:
        parts += [BLANK, _candidates_table(problem, solution, width=width)]
    return View([*parts, BLANK, Text(f"searched in {solution.search_s:.3f} s", "dim")])


def _groups_table(problem: PlacementProblem, settings: SearchSettings, best: FilledCandidate) -> Table:
    title = (
        f"{settings.policy}: {len(problem.models)} models on {problem.gpus} GPUs of "
        f"{gib(round(problem.memory_bytes)):.1f} GiB"
    )
    columns = [
        Column("group", align="right", style="dim", wrap="words"),
        Column("GPUs"),
        Column("shape"),
        number_column("GiB per GPU"),
        Column("models", wrap="fold"),
    ]
    rows, first = [], 0
    for number, group in enumerate(best.placement, start=1):
        gpus = range(first, first := first + group.shape.gpus)
        names = " ".join(problem.models[model].name for model in group.models)
        held_gib = f"{gib(round(gpu_bytes(group, problem))):.1f}" if group.models else NONE
        rows.append(row(str(number), gpu_list(gpus), _shape(group.shape), held_gib, names or NONE))
    return Table(title, columns, rows)


def _summary(problem: PlacementProblem, best: FilledCandidate) -> Iterator[Text]:
    yield Text(
        f"{share(best.attainment)} of {len(problem.demand):,} requests within their SLO, mean latency "
        f"{figure(best.mean_latency_s)} s (0 where dropped), {best.replicas} replicas, score {best.score:.6f}"
    )
    missing = _models_without_replica(best.placement, problem)
    if missing:
        names = " ".join(missing[:_MAX_NAMES]) + (" ..." if len(missing) > _MAX_NAMES else "")
        yield Text.of(("left out ", "bold yellow"), f"{len(missing)} of {len(problem.models)} models: {names}")


def _models_without_replica(placement: Placement, problem: PlacementProblem) -> list[str]:
    hosted = {model for group in placement for model in group.models}
    return [spec.name for model, spec in enumerate(problem.models) if model not in hosted]


def _candidates_table(problem: PlacementProblem, solution: PlacementSolution, *, width: int) -> Table:
    """Return every candidate in the order of enumeration, the chosen one highlighted."""
    columns = [
        Column("#", align="right", style="dim", wrap="words"),
        Column("groups", wrap="fold", max_width=max(20, width - 60)),
        *map(number_column, ("replicas", "left out", "SLO met", "latency s", "score")),
    ]
    rows = [
        _candidate_row(number, candidate, problem, chosen=candidate is solution.best)
        for number, candidate in enumerate(solution.candidates, start=1)
    ]
    return Table(f"Candidates: {len(solution.candidates)}", columns, rows)


def _candidate_row(number: int, candidate: FilledCandidate, problem: PlacementProblem, *, chosen: bool) -> Row:
    left_out = len(_models_without_replica(candidate.placement, problem))
    return row(
        str(number),
        _shapes([group.shape for group in candidate.placement]),
        str(candidate.replicas),
        str(left_out) if left_out else NONE,
        share(candidate.attainment),
        figure(candidate.mean_latency_s),
        f"{candidate.score:.6f}",
        style="bold green" if chosen else "",
    )


def _shapes(shapes: Sequence[GroupShape]) -> str:
    """Return shapes as text, with equal ones counted: 4 x (TP 2 x PP 1)."""
    counted = [
        (shape, len(list(equal))) for shape, equal in groupby(sorted(shapes, key=lambda shape: (-shape.gpus, shape)))
    ]
    return ", ".join(f"{count} x ({_shape(shape)})" if count > 1 else _shape(shape) for shape, count in counted)


def _shape(shape: GroupShape) -> str:
    return f"TP {shape.tp} x PP {shape.pp}"


def progress_line(progress: SearchProgress, elapsed_s: float) -> str:
    """Return the progress of a search in one line."""
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
