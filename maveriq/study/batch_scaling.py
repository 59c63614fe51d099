"""How latency, throughput and memory grow with the batch, and how far estimates of batches are off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from maveriq.calibration.measurements import Measurement
from maveriq.study.predictions import Predictions
from maveriq.study.ratios import grouped, median, ratios_to
from maveriq.study.result import Cell, Panel, Series, StudyResult, StudyTable
from maveriq.study.runs import Runs

COLUMNS = ("model", "tp", "batch", "engines", "latency_ratio", "tokens_per_s_ratio", "memory_ratio")
"""Medians over weight types, PP and output lengths, relative to batch 1; error columns of the estimators follow."""


def analyse(runs: Runs, predictions: Predictions, options: Mapping[str, Sequence[int]]) -> StudyResult:
    """Compare every batch with batch 1 of the same engine.

    Args:
        runs: `batched`.
        predictions: of the estimators.
        options: none.
    """
    del options
    batched = runs["batched"]
    base = {_alone(run): run for run in batched if run.configuration.batch_size == 1}
    compared = {id(run): (latency, memory) for run, latency, memory in ratios_to(batched, base, _alone)}
    errors = {
        name: {id(answer.measured): answer.latency_ape for answer in predictions.answers(name, batched)}
        for name in predictions.by_name
    }
    rows: list[tuple[Cell, ...]] = []
    groups = grouped(
        (run for run in batched if id(run) in compared),
        lambda run: (run.model_name, run.configuration.tp, run.configuration.batch_size),
    )
    for (model, tp, batch), members in groups.items():
        latency = median(compared[id(run)][0] for run in members)
        memory = median(compared[id(run)][1] for run in members)
        engines = len({_alone(run)[:-1] for run in members})
        known = [[of[id(run)] for run in members if id(run) in of] for of in errors.values()]
        cells = [round(median(found), 2) if found else None for found in known]
        rows.append((model, tp, batch, engines, latency, round(batch / latency, 3), memory, *cells))
    columns = (*COLUMNS, *(f"{name}_error_median" for name in errors))
    return StudyResult(
        table=StudyTable(columns=columns, rows=tuple(rows)),
        panels=_panels(rows, columns),
        figures=_figures(batched, predictions),
        notes=("Ratios are to batch 1 of the same engine; medians over weight types, PP and output lengths.",),
    )


def _alone(run: Measurement) -> tuple[object, ...]:
    """Return what two runs that differ in nothing but the batch have in common."""
    return run.model_name, run.layer_split, replace(run.configuration, batch_size=1), run.output_tokens


def _figures(batched: Sequence[Measurement], predictions: Predictions) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name in predictions.by_name:
        answers = predictions.answers(name, batched)
        for batch in sorted({answer.measured.configuration.batch_size for answer in answers}):
            of_batch = [answer for answer in answers if answer.measured.configuration.batch_size == batch]
            figures[f"latency-median-at-batch-{batch} {name}"] = median(answer.latency_ape for answer in of_batch)
    return figures


def _panels(rows: Sequence[tuple[Cell, ...]], columns: Sequence[str]) -> tuple[Panel, ...]:
    def lines(column: str) -> tuple[Series, ...]:
        shown = [dict(zip(columns, row, strict=True)) for row in rows]
        found: dict[str, list[tuple[float, float]]] = {}
        for row in shown:
            label = f"{row['model']}, TP {row['tp']}"
            found.setdefault(label, []).append((float(row["batch"] or 0), float(row[column] or 0)))
        return tuple(
            Series(label=label, x=[x for x, _ in sorted(points)], y=[y for _, y in sorted(points)])
            for label, points in found.items()
        )

    return tuple(
        Panel(
            title=title,
            x_label="requests of a batch",
            y_label="relative to batch 1",
            series=lines(column),
            log_x=True,
            log_y=True,
        )
        for title, column in (
            ("Latency of a batch", "latency_ratio"),
            ("Tokens per second", "tokens_per_s_ratio"),
            ("Memory", "memory_ratio"),
        )
    )
