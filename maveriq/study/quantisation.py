"""What quantised weights and KV caches change, against 16 bit on the same GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from maveriq.calibration.measurements import Measurement
from maveriq.domain.models import KvType, WeightType
from maveriq.domain.parallel import KV_SUFFIX
from maveriq.study.predictions import Predictions
from maveriq.study.ratios import grouped, median, ratios_to
from maveriq.study.result import Cell, Mark, Panel, Series, StudyResult, StudyTable
from maveriq.study.runs import Runs, is_16_bit, storage

COLUMNS = ("model", "weights", "kv", "tp", "engines", "latency_ratio", "memory_ratio", "accuracy_percent")
"""Medians over PP and output lengths, relative to 16 bit; accuracy is that of the 16-bit model in percent."""


def analyse(runs: Runs, predictions: Predictions, options: Mapping[str, Sequence[int]]) -> StudyResult:
    """Compare every run with the one of 16 bit at the same (TP, PP) and lengths.

    Args:
        runs: `full_models`.
        predictions: knows accuracy.
        options: none.
    """
    del options
    base = {_alike(run): run for run in runs["full_models"] if is_16_bit(run)}
    compared = {id(run): ratios for run, *ratios in ratios_to(runs["full_models"], base, _alike)}
    quantised = [run for run in runs["full_models"] if id(run) in compared and not is_16_bit(run)]
    rows: list[tuple[Cell, ...]] = []
    groups = grouped(quantised, lambda run: (run.model_name, *storage(run), run.configuration.tp))
    for (model, weights, kv, tp), members in groups.items():
        latency, memory = (median(compared[id(run)][place] for run in members) for place in (0, 1))
        accuracy = predictions.accuracy_percent(model, weights, kv)
        engines = len({run.configuration for run in members})
        rows.append((model, weights.value, kv.value, tp, engines, latency, memory, accuracy))
    figures: dict[str, float] = {}
    for kind, members in grouped(quantised, storage).items():
        figures[f"latency-ratio {_name(kind)}"] = median(compared[id(run)][0] for run in members)
        figures[f"memory-ratio {_name(kind)}"] = median(compared[id(run)][1] for run in members)
    panels = tuple(
        _panel(quantised, {key: ratios[place] for key, ratios in compared.items()}, title)
        for place, title in ((0, "Latency of quantised models"), (1, "Memory of quantised models"))
    )
    return StudyResult(
        table=StudyTable(columns=COLUMNS, rows=tuple(rows)),
        panels=panels,
        figures=figures,
        notes=("Where 16 bit does not fit there is nothing to compare with, and no row.",),
    )


def _alike(run: Measurement) -> tuple[object, ...]:
    configuration = run.configuration
    return (
        run.model_name, configuration.tp, configuration.pp, run.layer_split, configuration.batch_size,
        run.output_tokens, run.prompt_tokens,
    )  # fmt: skip


def _name(kind: tuple[WeightType, KvType]) -> str:
    weights, kv = kind
    return f"{weights.value}{KV_SUFFIX[kv]}"


def _panel(quantised: Sequence[Measurement], ratio_of: Mapping[int, float], title: str) -> Panel:
    """Return bars for each way to store a model, a series for each model."""
    kinds = list(grouped(quantised, storage))
    series = []
    for model, members in grouped(quantised, lambda run: run.model_name).items():
        of_kind = grouped(members, storage)
        present = [kind for kind in kinds if kind in of_kind]
        heights = [median(ratio_of[id(run)] for run in of_kind[kind]) if kind in present else 0.0 for kind in kinds]
        series.append(Series(label=model, x=list(map(_name, kinds)), y=heights, mark=Mark.BARS))
    return Panel(
        title=title,
        x_label="weights and KV cache",
        y_label="relative to 16 bit",
        series=tuple(series),
        level=1.0,
    )
