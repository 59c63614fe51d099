"""How latency and memory grow with the layers of a fingerprint, and what two layer counts tell of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from maveriq.calibration.measurements import Measurement
from maveriq.study.predictions import Predictions
from maveriq.study.ratios import DECIMALS, grouped
from maveriq.study.result import Cell, Panel, Series, StudyResult, StudyTable
from maveriq.study.runs import Runs, degrees, storage

COLUMNS = (
    "model", "weights", "tp", "pp", "layers", "latency_ratio", "memory_ratio", "from_layers", "latency_error",
    "memory_error",
)  # fmt: skip
"""Ratios are to the whole model; errors, in percent, are those of a straight line through two smaller layer counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """A line through two layer counts, and its errors at the whole model, in percent."""

    first: int
    second: int
    latency_error: float
    memory_error: float


def analyse(runs: Runs, predictions: Predictions, options: Mapping[str, Sequence[int]]) -> StudyResult:
    """Draw straight lines through two layer counts each, and compare them with the whole model.

    Args:
        runs: `layers`: models cut to several layer counts, the whole one among them.
        predictions: none are used.
        options: none.
    """
    del predictions, options
    rows: list[tuple[Cell, ...]] = []
    figures: dict[str, float] = {}
    ratio_lines: list[Series] = []
    error_lines: list[Series] = []
    groups = grouped(runs["layers"], lambda run: (run.model_name, *storage(run), *degrees(run), run.output_tokens))
    for (model, _, _, tp, pp, _), members in groups.items():
        ordered = sorted({run.layers: run for run in members}.values(), key=lambda run: run.layers)
        pairs = _pairs(ordered)
        rows += _rows(ordered, {pair.second: pair for pair in pairs})
        label = f"{model}, TP {tp} x PP {pp}"
        whole_s = ordered[-1].latency_s
        x, y = [run.layers for run in ordered], [run.latency_s / whole_s for run in ordered]
        ratio_lines.append(Series(label=label, x=x, y=y))
        if len(pairs) > 1:
            x, y = [pair.second for pair in pairs], [abs(pair.latency_error) for pair in pairs]
            error_lines.append(Series(label=label, x=x, y=y))
        for pair in pairs[:1]:
            name = f"{model} TP {tp} x PP {pp} from {pair.first} and {pair.second} layers"
            figures |= {f"latency-error {name}": pair.latency_error, f"memory-error {name}": pair.memory_error}
    return StudyResult(
        table=StudyTable(columns=COLUMNS, rows=tuple(rows)),
        panels=_panels(ratio_lines, error_lines),
        figures=figures,
        notes=(
            "The errors in a row are those for the whole model of a line through the two layer counts in from_layers.",
        ),
    )


def _rows(ordered: Sequence[Measurement], pair_of: Mapping[int, _Pair]) -> Iterator[tuple[Cell, ...]]:
    whole = ordered[-1]
    for run in ordered:
        pair = pair_of.get(run.layers)
        ratios = (round(of(run) / of(whole), DECIMALS) for of in (_latency_s, _memory_gib))
        errors: tuple[Cell, ...] = ("", None, None)
        if pair is not None:
            errors = (f"{pair.first} {pair.second}", round(pair.latency_error, 2), round(pair.memory_error, 2))
        yield (run.model_name, *storage(run)[:1], *degrees(run), run.layers, *ratios, *errors)


def _panels(ratio_lines: Sequence[Series], error_lines: Sequence[Series]) -> tuple[Panel, ...]:
    ratios = Panel(
        title="Latency of a model cut to some layers",
        x_label="layers",
        y_label="relative to the whole model",
        series=tuple(ratio_lines),
    )
    errors = Panel(
        title="Error for the whole model of a line through two layer counts",
        x_label="layers of the larger of the two",
        y_label="error of latency, %",
        series=tuple(error_lines),
    )
    return (ratios, errors) if error_lines else (ratios,)


def _pairs(ordered: Sequence[Measurement]) -> list[_Pair]:
    """Return a line through each two neighbouring layer counts below the whole model."""
    whole = ordered[-1]
    return [
        _Pair(
            first=first.layers,
            second=second.layers,
            latency_error=_error(first, second, whole, _latency_s),
            memory_error=_error(first, second, whole, _memory_gib),
        )
        for first, second in pairwise(ordered[:-1])
    ]


def _error(first: Measurement, second: Measurement, whole: Measurement, of: Callable[[Measurement], float]) -> float:
    slope = (of(second) - of(first)) / (second.layers - first.layers)
    return 100 * ((of(first) + slope * (whole.layers - first.layers)) / of(whole) - 1)


def _latency_s(run: Measurement) -> float:
    return run.latency_s


def _memory_gib(run: Measurement) -> float:
    return run.memory_gib
