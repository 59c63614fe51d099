"""How much faster more GPUs make one request, by tensor and by pipeline parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from maveriq.calibration.measurements import Measurement
from maveriq.study.predictions import Predictions
from maveriq.study.ratios import DECIMALS, grouped
from maveriq.study.result import Cell, Panel, Series, StudyResult, StudyTable
from maveriq.study.runs import Runs, degrees, storage

COLUMNS = ("model", "weights", "kv", "tp", "pp", "gpus", "speedup", "efficiency", "memory_ratio")
"""Speedup over the configuration with the fewest GPUs; efficiency is the speedup over what as many GPUs could give."""


def analyse(runs: Runs, predictions: Predictions, options: Mapping[str, Sequence[int]]) -> StudyResult:
    """Compare every configuration with the one of fewest GPUs of the same model and types.

    Args:
        runs: `full_models`.
        predictions: none are used.
        options: `judged_output_tokens`: the output length to compare at.
    """
    del predictions
    tokens = options["judged_output_tokens"][0]
    chosen = [run for run in runs["full_models"] if run.output_tokens == tokens]
    rows: list[tuple[Cell, ...]] = []
    figures: dict[str, float] = {}
    series: list[Series] = []
    for (model, *kind), members in grouped(chosen, lambda run: (run.model_name, *storage(run))).items():
        base = min(members, key=lambda run: (run.configuration.gpus, degrees(run)))
        speedup = {degrees(run): base.latency_s / run.latency_s for run in members}
        for run in members:
            at, gpus = degrees(run), run.configuration.gpus
            efficiency = speedup[at] * base.configuration.gpus / gpus
            ratios = (speedup[at], efficiency, run.memory_gib / base.memory_gib)
            rows.append((model, *kind, *at, gpus, *(round(value, DECIMALS) for value in ratios)))
        best = max(speedup, key=lambda at: speedup[at])
        figures[f"best-speedup {model} {' '.join(kind)}"] = speedup[best]
        if _is_first_kind(members, chosen):
            series += _lines(model, members, speedup)
    panel = Panel(
        title="Speedup of one request by tensor and by pipeline parallelism",
        x_label="GPUs",
        y_label="relative to the fewest GPUs",
        series=tuple(series),
        log_x=True,
        level=1.0,
    )
    return StudyResult(
        table=StudyTable(columns=COLUMNS, rows=tuple(rows)),
        panels=(panel,),
        figures=figures,
        notes=("The plot shows the first types of each model: TP at the smallest PP, and PP at the smallest TP.",),
    )


def _is_first_kind(members: Sequence[Measurement], chosen: Sequence[Measurement]) -> bool:
    first = next(run for run in chosen if run.model_name == members[0].model_name)
    return storage(first) == storage(members[0])


def _lines(model: str, members: Sequence[Measurement], speedup: Mapping[tuple[int, int], float]) -> Iterator[Series]:
    """Yield a line over TP and one over PP, each at the smallest degree of the other."""
    for name, varied in (("TP", 0), ("PP", 1)):
        fixed = min(degrees(run)[1 - varied] for run in members)
        found = sorted((at[0] * at[1], value) for at, value in speedup.items() if at[1 - varied] == fixed)
        if len(found) > 1:
            yield Series(label=f"{model}, {name}", x=[x for x, _ in found], y=[y for _, y in found])
