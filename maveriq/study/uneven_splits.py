"""What it costs to deal a model's layers unevenly to its pipeline stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from maveriq.calibration.measurements import Measurement
from maveriq.domain.parallel import even_split
from maveriq.study.predictions import Predictions
from maveriq.study.ratios import DECIMALS, ratios_to
from maveriq.study.result import Cell, Mark, Panel, Series, StudyResult, StudyTable
from maveriq.study.runs import Runs

COLUMNS = ("model", "tp", "pp", "layer_split", "batch", "largest_stage", "latency_ratio", "memory_ratio")
"""`largest_stage` is its layers over those of an even share; ratios are to the even split."""


def analyse(runs: Runs, predictions: Predictions, options: Mapping[str, Sequence[int]]) -> StudyResult:
    """Compare every split with the even one of the same model and batch.

    Args:
        runs: `splits`.
        predictions: none are used.
        options: none.
    """
    del predictions, options
    base = {_alike(run): run for run in runs["splits"] if _is_even(run)}
    rows: list[tuple[Cell, ...]] = []
    marks: dict[str, list[tuple[float, float]]] = {}
    changes: list[float] = []
    for run, latency, memory in ratios_to(runs["splits"], base, _alike):
        configuration = run.configuration
        largest = max(run.layer_split) * configuration.pp / run.layers
        split = " ".join(map(str, run.layer_split))
        cells = (run.model_name, configuration.tp, configuration.pp, split, configuration.batch_size)
        rows.append((*cells, round(largest, 3), round(latency, DECIMALS), round(memory, DECIMALS)))
        if not _is_even(run):
            changes.append(100 * (latency - 1))
            marks.setdefault(run.model_name, []).append((largest, changes[-1]))
    panel = Panel(
        title="Latency of an uneven split (a mark for each split and batch)",
        x_label="layers of the largest stage, over an even share",
        y_label="change against the even split, %",
        series=tuple(
            Series(label=model, x=[x for x, _ in points], y=[y for _, y in points], mark=Mark.POINTS)
            for model, points in marks.items()
        ),
        level=0.0,
    )
    sizes = np.abs(changes)
    figures = {
        "latency-change-median": float(np.median(sizes)),
        "latency-change-p90": float(np.percentile(sizes, 90)),
        "latency-change-worst": float(sizes.max()),
    }
    return StudyResult(
        table=StudyTable(columns=COLUMNS, rows=tuple(rows)),
        panels=(panel,),
        figures=figures,
        notes=("Changes are in percent of the even split, whatever their sign.",),
    )


def _alike(run: Measurement) -> tuple[object, ...]:
    return run.model_name, run.configuration, run.output_tokens, run.prompt_tokens


def _is_even(run: Measurement) -> bool:
    return run.layer_split == even_split(run.layers, run.configuration.pp)
