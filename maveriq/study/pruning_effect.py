"""What pruned weights change when dense kernels run them: latency and memory, against the model that was pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from maveriq.calibration.measurements import Measurement
from maveriq.study.predictions import Predictions
from maveriq.study.ratios import grouped, median, ratios_to
from maveriq.study.result import Cell, Mark, Panel, Series, StudyResult, StudyTable
from maveriq.study.runs import Runs

COLUMNS = ("model", "pruned", "tp", "engines", "latency_ratio", "memory_ratio")
"""Medians over PP and output lengths, relative to the model that was pruned."""


def analyse(runs: Runs, predictions: Predictions, options: Mapping[str, Sequence[int]]) -> StudyResult:
    """Compare every run of a pruned model with the one of its base model.

    Args:
        runs: `pruned` and `full_models`, the base models.
        predictions: none are used.
        options: none.
    """
    del predictions, options
    base = {_alike(run): run for run in runs["full_models"]}
    compared = {id(run): ratios for run, *ratios in ratios_to(runs["pruned"], base, _alike)}
    pruned = [run for run in runs["pruned"] if id(run) in compared]
    rows: list[tuple[Cell, ...]] = []
    for members in grouped(pruned, lambda run: (run.model_name, run.configuration.tp)).values():
        latency, memory = (median(compared[id(run)][place] for run in members) for place in (0, 1))
        first, engines = members[0], len({run.configuration for run in members})
        rows.append((_base_name(first), _method(first), first.configuration.tp, engines, latency, memory))
    of_method = grouped(pruned, _method)
    figures: dict[str, float] = {}
    for method, members in of_method.items():
        figures[f"latency-ratio {method}"] = median(compared[id(run)][0] for run in members)
        figures[f"memory-ratio {method}"] = median(compared[id(run)][1] for run in members)
    panel = Panel(
        title="Pruned models on dense kernels",
        x_label="how the model was pruned",
        y_label="relative to the model that was pruned",
        series=tuple(
            Series(
                label=what,
                x=list(of_method),
                y=[figures[f"{what}-ratio {method}"] for method in of_method],
                mark=Mark.BARS,
            )
            for what in ("latency", "memory")
        ),
        level=1.0,
    )
    return StudyResult(
        table=StudyTable(columns=COLUMNS, rows=tuple(rows)),
        panels=(panel,),
        figures=figures,
        notes=(
            "A mask sets weights to zero, which dense kernels read and multiply as they do other numbers.",
            "Latency and memory change only with kernels and formats of sparse weights.",
        ),
    )


def _base_name(run: Measurement) -> str:
    return run.model.name if run.model is not None else run.model_name


def _method(run: Measurement) -> str:
    return run.model_name.removeprefix(_base_name(run)).lstrip("-")


def _alike(run: Measurement) -> tuple[object, ...]:
    return _base_name(run), run.configuration, run.layer_split, run.output_tokens, run.prompt_tokens
