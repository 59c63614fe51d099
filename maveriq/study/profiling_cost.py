"""The cost of profiling a model against the error of what it then predicts.

Three plans: measure every configuration of the whole model; measure three of them, and solve the paper's formula for
the others; measure fingerprints. A plan measures each engine at the two output lengths of fingerprints (10 and 20
tokens), so that costs compare, and is judged at the output length of the option `judged_output_tokens`.

Building a model or an engine keeps one GPU busy, a run all GPUs of its configuration.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from maveriq.calibration.measurements import Measurement
from maveriq.errors import InputError
from maveriq.estimate.fingerprints import OUTPUTS, Exponents
from maveriq.study.few_configurations import Degrees, solve
from maveriq.study.predictions import PAPER, UNSEEN, Predictions
from maveriq.study.result import Cell, Mark, Panel, Series, StudyResult, StudyTable, percentage_errors
from maveriq.study.runs import Runs, by_model, degrees, engine_of, is_16_bit, lines_of, storage

_THREE = 3
_SECONDS_PER_HOUR = 3600.0

COLUMNS = (
    "types", "model", "plan", "engines", "time_ratio", "gpu_hours_ratio", "memory_ratio", "latency_error_median",
    "latency_error_p90", "memory_error_median",
)  # fmt: skip
"""Ratios are to the cost of fingerprints; errors are absolute percentage errors."""

EVERY, THREE, FINGERPRINTS, CALIBRATED = (
    "every configuration", "three configurations", "fingerprints", "fingerprints, calibrated",
)  # fmt: skip


_PLANS = {PAPER: FINGERPRINTS, UNSEEN: CALIBRATED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a plan costs: engines started, hours on a clock, hours of GPUs, and the memory of its largest run in GiB."""

    engines: int
    hours: float
    gpu_hours: float
    peak_gib: float


def cost_of(runs: Iterable[Measurement]) -> Cost:
    """Add up what runs cost; a model and an engine are built once.

    Raises:
        InputError: a run without its cost.
    """
    engines: set[object] = set()
    seconds = gpu_seconds = peak_gib = 0.0
    for run in runs:
        if run.cost is None:
            raise InputError(f"{run.where}: no columns engine_build_s and profile_run_s, which a study of cost needs")
        build_s = 0.0 if engine_of(run) in engines else run.cost.model_build_s + run.cost.engine_build_s
        engines.add(engine_of(run))
        seconds += build_s + run.cost.run_s
        gpu_seconds += build_s + run.cost.run_s * run.configuration.gpus
        peak_gib = max(peak_gib, run.memory_gib)
    return Cost(
        engines=len(engines),
        hours=seconds / _SECONDS_PER_HOUR,
        gpu_hours=gpu_seconds / _SECONDS_PER_HOUR,
        peak_gib=peak_gib,
    )


def fewest_gpus(runs: Iterable[Measurement]) -> tuple[Degrees, ...]:
    """Return the three measured (TP, PP) with the fewest GPUs, TP ascending among equals."""
    return tuple(sorted({degrees(run) for run in runs}, key=lambda at: (at[0] * at[1], at))[:_THREE])


Group: TypeAlias = Sequence[Measurement]
"""Runs of one model whose weights and KV cache are stored alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Errors:
    latency: tuple[float, ...]
    memory: tuple[float, ...]

    def cells(self) -> tuple[float, float, float]:
        return float(np.median(self.latency)), float(np.percentile(self.latency, 90)), float(np.median(self.memory))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """A model's runs: of the whole model at the lengths of fingerprints, of fingerprints, and those to judge by."""

    name: str
    whole: Group
    fingerprints: Group
    judged: Group

    def by_storage(self) -> Iterator[tuple[Group, Group]]:
        """Yield runs and judged runs of each way to store the model."""
        for kind in dict.fromkeys(map(storage, self.whole)):
            yield [run for run in self.whole if storage(run) == kind], [r for r in self.judged if storage(r) == kind]


def analyse(runs: Runs, predictions: Predictions, options: Mapping[str, Sequence[int]]) -> StudyResult:
    """Compare the plans for every model, in 16 bit alone and with all weight and KV types.

    Args:
        runs: `full_models` and `fingerprints`.
        predictions: of the estimators that take fingerprints, and the exponents of the paper's formula.
        options: `judged_output_tokens`: the output length to judge at.
    """
    judged_tokens = options["judged_output_tokens"][0]
    rows: list[tuple[Cell, ...]] = []
    figures: dict[str, float] = {}
    models_of = {"float16": is_16_bit, "all types": lambda _: True}
    for types, chosen in models_of.items():
        for model in _models(runs, chosen, judged_tokens):
            rows += [(types, model.name, *row) for row in _rows(model, predictions)]
            if types == "float16":
                figures |= _figures(model)
    ratios = [value for name, value in figures.items() if name.startswith("memory-ratio ")]
    figures |= {"memory-ratio-least": min(ratios), "memory-ratio-most": max(ratios)}
    for column in ("time_ratio", "gpu_hours_ratio"):
        every = [row[COLUMNS.index(column)] for row in rows if row[0] == "float16" and row[2] == EVERY]
        name = column.replace("_", "-")
        figures |= {f"every-{name}-least": min(map(_number, every)), f"every-{name}-most": max(map(_number, every))}
    return StudyResult(
        table=StudyTable(columns=COLUMNS, rows=tuple(rows)),
        panels=_panels(rows),
        figures=figures,
        notes=(
            "Ratios are to the cost of fingerprints at (TP, PP) (1,1), (1,2) and (2,1).",
            "Three configurations are those with the fewest GPUs that hold the model.",
        ),
    )


def _number(cell: Cell) -> float:
    return float(cell or 0.0)


def _models(runs: Runs, chosen: Callable[[Measurement], bool], judged_tokens: int) -> Iterator[_Model]:
    fingerprints = by_model(filter(chosen, runs["fingerprints"]))
    for name, whole in by_model(filter(chosen, runs["full_models"])).items():
        if name in fingerprints:
            yield _Model(
                name=name,
                whole=[run for run in whole if run.output_tokens in OUTPUTS],
                fingerprints=[run for run in fingerprints[name] if degrees(run) in ((1, 1), (1, 2), (2, 1))],
                judged=[run for run in whole if run.output_tokens == judged_tokens],
            )


def _three(model: _Model) -> list[Measurement]:
    """Return the runs at the three smallest configurations of each way to store the model."""
    return [run for group, _ in model.by_storage() for run in group if degrees(run) in fewest_gpus(group)]


def _rows(model: _Model, predictions: Predictions) -> Iterator[tuple[Cell, ...]]:
    least = cost_of(model.fingerprints)
    plans: list[tuple[str, Cost, _Errors]] = [
        (EVERY, cost_of(model.whole), _every_errors(model)),
        (THREE, cost_of(_three(model)), _three_errors(model, predictions)),
        *((_PLANS[name], least, _estimator_errors(model, predictions, name)) for name in predictions.by_name),
    ]
    for plan, cost, errors in plans:
        ratios = (cost.hours / least.hours, cost.gpu_hours / least.gpu_hours, cost.peak_gib / least.peak_gib)
        yield (plan, cost.engines, *(round(value, 2) for value in (*ratios, *errors.cells())))


def _figures(model: _Model) -> dict[str, float]:
    """Return the ratios of three configurations to fingerprints, and what every choice of three gives."""
    least, three = cost_of(model.fingerprints), cost_of(_three(model))
    choices = itertools.combinations({degrees(run) for run in model.whole}, _THREE)
    costs = [cost_of(run for run in model.whole if degrees(run) in choice) for choice in choices]
    found = {f"memory-ratio {model.name}": three.peak_gib / least.peak_gib}
    for name in ("hours", "gpu_hours"):
        ratios = [getattr(cost, name) / getattr(least, name) for cost in costs]
        figure = f"{'time' if name == 'hours' else 'gpu-hours'}-ratio"
        found |= {
            f"{figure} {model.name}": getattr(three, name) / getattr(least, name),
            f"{figure}-least {model.name}": min(ratios),
            f"{figure}-mean {model.name}": float(np.mean(ratios)),
            f"{figure}-most {model.name}": max(ratios),
        }
    return found


def _errors(pairs: Iterable[tuple[Measurement, float, float]]) -> _Errors:
    """Return the errors of estimates: measured runs, each with an estimated latency and memory."""
    measured, latency_s, memory_gib = zip(*pairs, strict=True)
    return _Errors(
        latency=tuple(percentage_errors(latency_s, [run.latency_s for run in measured])),
        memory=tuple(percentage_errors(memory_gib, [run.memory_gib for run in measured])),
    )


def _every_errors(model: _Model) -> _Errors:
    """Return the errors of what was measured, drawn on from the lengths of fingerprints to the judged one."""
    lines = dict(lines_of(model.whole))
    memory_gib = {engine_of(run): run.memory_gib for run in model.whole if run.output_tokens == min(OUTPUTS)}
    return _errors(
        (run, lines[engine_of(run)].at(run.output_tokens), memory_gib[engine_of(run)]) for run in model.judged
    )


def _three_errors(model: _Model, predictions: Predictions) -> _Errors:
    pairs: list[tuple[Measurement, float, float]] = []
    for whole, judged in model.by_storage():
        exponents = predictions.exponents[storage(whole[0])]
        pairs += _from_three(whole, judged, exponents)
    return _errors(pairs)


def _from_three(whole: Group, judged: Group, exponents: Exponents) -> Iterator[tuple[Measurement, float, float]]:
    """Yield the judged runs, each with latency and memory as three configurations tell them."""
    chosen = fewest_gpus(whole)
    few = [run for run in whole if degrees(run) in chosen]
    at = {(configuration.tp, configuration.pp): line for (_, _, configuration), line in lines_of(few)}
    memory_gib = {degrees(run): run.memory_gib for run in few if run.output_tokens == min(OUTPUTS)}
    for run in judged:
        latency_s = {there: line.at(run.output_tokens) for there, line in at.items()}
        solved = solve(latency_s, memory_gib, exponents)
        yield run, solved.latency_s(degrees(run)), solved.memory_gib(degrees(run))


def _estimator_errors(model: _Model, predictions: Predictions, name: str) -> _Errors:
    answers = predictions.answers(name, model.judged)
    if not answers:
        raise InputError(f"{model.name}: estimator {name} predicts no run to judge by; measure more fingerprints")
    return _Errors(
        latency=tuple(answer.latency_ape for answer in answers),
        memory=tuple(answer.memory_ape for answer in answers if answer.memory_ape is not None),
    )


def _panels(rows: Sequence[tuple[Cell, ...]]) -> tuple[Panel, ...]:
    def series(x: str, y: str) -> tuple[Series, ...]:
        shown = [dict(zip(COLUMNS, row, strict=True)) for row in rows if row[0] == "float16"]
        return tuple(
            Series(
                label=plan,
                x=[_number(row[x]) for row in shown if row["plan"] == plan],
                y=[_number(row[y]) for row in shown if row["plan"] == plan],
                mark=Mark.POINTS,
            )
            for plan in (EVERY, THREE, FINGERPRINTS, CALIBRATED)
        )

    return (
        Panel(
            title="GPU-hours of profiling and the error of latency (16 bit, a mark for each model)",
            x_label="GPU-hours, relative to fingerprints",
            y_label="median error, %",
            series=series("gpu_hours_ratio", "latency_error_median"),
            log_x=True,
        ),
        Panel(
            title="Memory of profiling and the error of memory (16 bit, a mark for each model)",
            x_label="memory of the largest run, relative to fingerprints",
            y_label="median error, %",
            series=series("memory_ratio", "memory_error_median"),
            log_x=True,
        ),
    )
