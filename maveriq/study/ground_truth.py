"""Whole models measured under every configuration, and how far estimates from fingerprints are off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from maveriq.calibration.evaluation import Answer, Group, grouped_errors
from maveriq.errors import InputError
from maveriq.study.predictions import Predictions
from maveriq.study.result import Cell, Mark, Panel, Series, StudyResult, StudyTable
from maveriq.study.runs import Runs

COLUMNS = (
    "estimator", "by", "value", "runs", "latency_error_median", "latency_error_mean", "latency_error_p90",
    "latency_error_worst", "memory_error_median", "memory_error_p90",
)  # fmt: skip
"""Errors are absolute percentage errors."""

_SHOWN = ("all", "model", "weights/kv", "tp", "pp", "output tokens")


def analyse(runs: Runs, predictions: Predictions, options: Mapping[str, Sequence[int]]) -> StudyResult:
    """Compare every estimator with every run of a whole model, grouped by what may matter.

    Args:
        runs: `full_models`.
        predictions: of the estimators.
        options: `judged_output_tokens`: an output length whose errors are figures of their own.

    Raises:
        InputError: an estimator predicts nothing at that length.
    """
    tokens = options["judged_output_tokens"][0]
    rows: list[tuple[Cell, ...]] = []
    figures: dict[str, float] = {}
    groups_of: dict[str, tuple[Group, ...]] = {}
    for name in predictions.by_name:
        answers = predictions.answers(name, runs["full_models"])
        if not any(answer.measured.output_tokens == tokens for answer in answers):
            raise InputError(f"estimator {name} predicts no run of a whole model with {tokens} output tokens")
        groups = groups_of[name] = tuple(group for group in grouped_errors(answers) if group.by in _SHOWN)
        rows += [(name, *_cells(group)) for group in groups]
        figures |= _figures(name, groups[0], "")
        figures |= _figures(name, _overall(answers, tokens), f"-at-{tokens}-tokens")
    panels = (
        _panel(groups_of, "tp", "Error of latency by tensor-parallel degree", "TP"),
        _panel(groups_of, "output tokens", "Error of latency by output length", "output tokens"),
    )
    return StudyResult(table=StudyTable(columns=COLUMNS, rows=tuple(rows)), panels=panels, figures=figures)


def _overall(answers: Iterable[Answer], tokens: int) -> Group:
    return grouped_errors([answer for answer in answers if answer.measured.output_tokens == tokens])[0]


def _cells(group: Group) -> Iterator[Cell]:
    latency, memory = group.latency, group.memory
    yield from (group.by, group.value, latency.n)
    yield from (round(value, 2) for value in (latency.median, latency.mean, latency.p90, latency.worst))
    yield from (None, None) if memory is None else (round(memory.median, 2), round(memory.p90, 2))


def _figures(name: str, group: Group, where: str) -> dict[str, float]:
    found = {
        f"latency-median{where} {name}": group.latency.median,
        f"latency-mean{where} {name}": group.latency.mean,
        f"latency-p90{where} {name}": group.latency.p90,
    }
    if group.memory is not None:
        found[f"memory-median{where} {name}"] = group.memory.median
    return found


def _panel(groups_of: Mapping[str, Sequence[Group]], by: str, title: str, x_label: str) -> Panel:
    return Panel(
        title=title,
        x_label=x_label,
        y_label="median error, %",
        series=tuple(
            Series(
                label=name,
                x=[group.value for group in groups if group.by == by],
                y=[group.latency.median for group in groups if group.by == by],
                mark=Mark.BARS,
            )
            for name, groups in groups_of.items()
        ),
    )
