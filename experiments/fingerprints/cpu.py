"""Compare fingerprint profiles of small models with whole models in every configuration, on torch engines of a CPU.

Usage: python experiments/fingerprints/cpu.py [--settings FILE] [--work DIR] [--out DIR] [--page FILE] [MODEL...]

For each model of the settings, the engines of a planned fingerprint profile and of the whole model in every
configuration take turns, sample by sample, so that a slow moment of the machine meets both; each counts its own samples
and an equal share of the start. The whole model's times and memory are predicted by physics alone, and blended with the
first 1, 4 and 16 measurements and with all. What the whole model's samples say about themselves bounds the error that
can be seen: one half of them is compared with the other. Results go to results/, a table to docs/profiling.md. --work
keeps what was measured: an interrupted run goes on, and models may be measured one at a time. The exit code is 1 if a
bar of the settings is missed. The machine must be idle.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import msgspec

from maveriq.domain.models import KvType, ModelSpec, WeightType, config_path, load_model
from maveriq.estimate.blended import BlendedEstimator
from maveriq.estimate.computed_parts import ComputedParts
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.estimate.observations import Observation
from maveriq.estimate.physics import PhysicsEstimator
from maveriq.estimate.profile_file import (
    PROFILE_NAME,
    ProfileFile,
    RunRecord,
    observations_of,
    planned_profile,
    planning_profile,
    steadied,
)
from maveriq.exec.local_machine import LocalMachine
from maveriq.profiling.plan import ProfilePlan, plan_profile, plan_whole_model
from maveriq.profiling.planned import PlannedProfile, ProfileOptions, measure_plan

_HERE = Path(__file__).parent
_PAGE = _HERE.parents[1] / "docs" / "profiling.md"
_START, _END = "<!-- written by experiments/fingerprints/cpu.py -->", "<!-- end -->"
_COLUMNS = (
    "model",
    "layers",
    "weights",
    "batch",
    "prompt_tokens",
    "figure",
    "measurements",
    "measured",
    "predicted",
    "error_percent",
)
_FIGURES = ("TTFT", "TPOT", "memory")
_ITSELF = "itself"
"""In place of a number of measurements: half of the whole model's samples, which predict the other half."""


class Bars(msgspec.Struct, forbid_unknown_fields=True):
    """What the fingerprint profiles must reach."""

    median_percent: float
    worst_percent: float
    time_share: float


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """The experiment."""

    models: list[str]
    formats: list[WeightType]
    batch_sizes: list[int]
    prompt_tokens: list[int]
    output_tokens: int
    budget_share: float
    least_repeats: int
    most_repeats: int
    measurements: list[int]
    bars: Bars


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A figure of the whole model: measured, and predicted with so many measurements (0: physics alone)."""

    model: str
    layers: int
    weights: str
    batch: int
    prompt_tokens: int
    figure: str
    measurements: str
    measured: float
    predicted: float

    @property
    def error_percent(self) -> float:
        """How far the prediction is off."""
        return 100 * (self.predicted / self.measured - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds of both profiles of a model, and the time of a layer in short models over that in the whole one."""

    model: str
    fingerprints_s: float
    whole_s: float
    layer_ratio: float


def main(arguments: list[str]) -> int:
    """Measure, predict, write, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="models of the settings (default: all)")
    parser.add_argument("--settings", type=Path, default=_HERE / "cpu.toml", metavar="FILE")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder in which to keep what was measured")
    parser.add_argument("--out", type=Path, default=_HERE / "results", metavar="DIR")
    parser.add_argument("--page", type=Path, default=_PAGE, metavar="FILE", help="page with the table")
    parser.add_argument("--real-time", action="store_true", help="run engines before all other processes (root)")
    options = parser.parse_args(arguments)
    settings = msgspec.toml.decode(options.settings.read_bytes(), type=Settings)
    models = options.models or settings.models
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        compared = [
            compare_model(_HERE / "models" / name, settings, work / name, real_time=options.real_time)
            for name in models
        ]
    rows, costs = [row for found, _ in compared for row in found], [cost for _, cost in compared]
    options.out.mkdir(parents=True, exist_ok=True)
    write_results(options.out, rows, costs)
    table = "\n".join(table_lines(rows, costs, settings))
    sys.stdout.write(table + "\n")
    text = options.page.read_text(encoding="utf-8")
    before, _, rest = text.partition(_START)
    if rest:
        options.page.write_text(f"{before}{_START}\n\n{table}\n\n{_END}{rest.partition(_END)[2]}", encoding="utf-8")
    missed = list(missed_bars(rows, costs, settings))
    sys.stdout.write("".join(f"missed: {text}\n" for text in missed) or "all bars are met\n")
    return bool(missed)


def compare_model(folder: Path, settings: Settings, work: Path, *, real_time: bool = False) -> tuple[list[Row], Cost]:
    """Measure a model in both ways, and predict the whole one."""
    model = load_model(str(folder))
    local = LocalMachine("torch")
    options = ProfileOptions(
        prompt_tokens=settings.prompt_tokens,
        batch_sizes=settings.batch_sizes,
        output_tokens=settings.output_tokens,
        formats=[(weights, KvType.NATIVE) for weights in settings.formats],
        least_repeats=settings.least_repeats,
        most_repeats=settings.most_repeats,
        real_time=real_time,
    )
    planned = PlannedProfile({model.name: (model, config_path(folder))}, local, options)
    parts = ComputedParts(PhysicsEstimator(planning_profile(planned.machine, "torch")))
    wanted = planned.wanted(model, parts)
    whole_plan = plan_whole_model(wanted, parts)
    fingerprints = plan_profile(wanted, parts, budget_s=settings.budget_share * whole_plan.expected_s)
    same = replace(wanted, layers=sorted({len(run.layers) for run in fingerprints.runs}))
    budget_s = settings.budget_share * whole_plan.expected_s
    plans = {str(count): plan_profile(same, parts, budget_s=budget_s, most=count) for count in settings.measurements}
    both = msgspec.structs.replace(fingerprints, runs=(*fingerprints.runs, *whole_plan.runs))
    measured = _measured(planned, both, work)
    short, whole = (
        msgspec.structs.replace(
            measured, runs=tuple(run for run in measured.runs if is_whole(run, model) is wanted_kind)
        )
        for wanted_kind in (False, True)
    )
    path = work / "fingerprints.json"
    path.write_bytes(msgspec.json.encode(short))
    observed, profile = observations_of(short), planned_profile(path)
    known = {"0": (), **{name: _of_plan(observed, plan) for name, plan in plans.items()}, "all": observed}
    rows = [
        row
        for name, seen in known.items()
        for row in _predictions(model, observations_of(whole), replace(profile, observed=seen), name)
    ]
    rows += _against_itself(whole, model)
    start_s = max(run.start_s for run in measured.runs) / len(measured.runs)
    return rows, Cost(
        model=model.name,
        fingerprints_s=sum(start_s + samples_s(run) for run in short.runs),
        whole_s=sum(start_s + samples_s(run) for run in whole.runs),
        layer_ratio=median(layer_ratios(measured) or [math.nan]),
    )


def is_whole(run: RunRecord, model: ModelSpec) -> bool:
    """Return whether an engine had all layers."""
    return len(run.layers) == model.layers


def samples_s(run: RunRecord) -> float:
    """Return the seconds that an engine computed: its samples, and a warm-up of each batch."""
    total_s = 0.0
    for case in run.cases:
        each = [
            first + (case.output_tokens - 1) * token for first, token in zip(case.first_s, case.each_s, strict=True)
        ]
        total_s += sum(each) + median(each)
    return total_s


def layer_ratios(measured: ProfileFile) -> list[float]:
    """Return what a layer adds to the shortest models over what it adds to longer ones, for each time.

    About 1 if layers take equally long in models of any length: if no model fits a cache that another one does not.
    """
    times: dict[tuple[WeightType, int, int, str], dict[int, float]] = {}
    for run in measured.runs:
        for case in run.cases:
            for figure, samples in (("TTFT", case.first_s), ("TPOT", case.each_s)):
                of_case = times.setdefault((run.weights, case.batch, case.prompt_tokens, figure), {})
                of_case[len(run.layers)] = median(samples)
    found = []
    for of_case in times.values():
        if len(of_case) == 3:
            (few, few_s), (more, more_s), (whole, whole_s) = sorted(of_case.items())
            found.append((more_s - few_s) / (more - few) / ((whole_s - more_s) / (whole - more)))
    return found


def _measured(planned: PlannedProfile, plan: ProfilePlan, folder: Path) -> ProfileFile:
    """Measure a plan, all its engines in turns; what is there already is read."""
    path = folder / PROFILE_NAME
    if not path.exists():
        profile = measure_plan(planned, plan, folder, _report, side_by_side=len(plan.runs))
        path.write_bytes(msgspec.json.encode(profile))
    return steadied(msgspec.json.decode(path.read_bytes(), type=ProfileFile))


def _report(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _of_plan(observed: Sequence[Observation], plan: ProfilePlan) -> tuple[Observation, ...]:
    """Return what a shorter plan would have measured."""
    chosen = {
        (len(run.layers), run.configuration, (case.batch, case.prompt_tokens))
        for run in plan.runs
        for case in run.cases
    }
    return tuple(
        seen
        for seen in observed
        if (seen.model.layers, seen.configuration, (seen.batch.size, seen.batch.prompt_tokens)) in chosen
    )


def _predictions(
    model: ModelSpec, whole: Sequence[Observation], profile: HardwareProfile, measurements: str
) -> Iterator[Row]:
    estimator = BlendedEstimator(profile)
    for seen in whole:
        size, prompt, output = seen.batch
        service = estimator.service(model, seen.configuration, prompt_tokens=prompt, output_tokens=output, batch=size)
        figures = [(seen.first_token_s, service.first_token_s), (seen.tpot_s, service.tpot_s)]
        if seen.memory_bytes:
            loaded = seen.memory_batch or seen.batch
            memory = estimator.memory_with(
                model,
                replace(seen.configuration, batch_size=loaded.size),
                prompt_tokens=loaded.prompt_tokens,
                output_tokens=loaded.output_tokens,
            )
            figures.append((seen.memory_bytes, memory))
        for figure, (measured, predicted) in zip(_FIGURES, figures, strict=False):
            yield Row(
                model=model.name,
                layers=model.layers,
                weights=seen.configuration.weights.value,
                batch=size,
                prompt_tokens=prompt,
                figure=figure,
                measurements=measurements,
                measured=measured,
                predicted=predicted,
            )


def _against_itself(whole: ProfileFile, model: ModelSpec) -> Iterator[Row]:
    """Yield the times of the whole model by every second sample, predicted by the other samples."""
    for run in whole.runs:
        for case in run.cases:
            for figure, samples in (("TTFT", case.first_s), ("TPOT", case.each_s)):
                yield Row(
                    model=model.name,
                    layers=model.layers,
                    weights=run.weights.value,
                    batch=case.batch,
                    prompt_tokens=case.prompt_tokens,
                    figure=figure,
                    measurements=_ITSELF,
                    measured=median(samples[::2]),
                    predicted=median(samples[1::2]),
                )


def write_results(out: Path, rows: Sequence[Row], costs: Sequence[Cost]) -> None:
    """Write a row for each figure, and one for the time of each model."""
    with (out / "cpu.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(_COLUMNS)
        for row in rows:
            values = (row.measured, row.predicted)
            table.writerow([
                row.model, row.layers, row.weights, row.batch, row.prompt_tokens, row.figure, row.measurements,
                *(f"{value:.6g}" for value in values), f"{row.error_percent:.2f}",
            ])  # fmt: skip
    with (out / "cpu_cost.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["model", "fingerprints_s", "whole_s", "layer_ratio"])
        table.writerows(
            [cost.model, f"{cost.fingerprints_s:.1f}", f"{cost.whole_s:.1f}", f"{cost.layer_ratio:.3f}"]
            for cost in costs
        )


def errors_by(rows: Sequence[Row], **equal: str) -> list[float]:
    """Return the absolute errors of rows with these values, in percent."""
    return [abs(row.error_percent) for row in rows if all(getattr(row, name) == value for name, value in equal.items())]


def table_lines(rows: Sequence[Row], costs: Sequence[Cost], settings: Settings) -> Iterator[str]:
    """Yield the tables of the page."""
    errors = [f"{figure}: median %, worst %" for figure in _FIGURES]
    yield f"| measurements | {' | '.join(errors)} | all: median % |"
    yield "|---|---|---|---|---|"
    for count in [*_counts(settings), _ITSELF]:
        cells = [_cell(errors_by(rows, measurements=count, figure=figure)) for figure in _FIGURES]
        name = {
            "0": "none: physics alone",
            "all": "all of the plan",
            _ITSELF: "half of the whole model's samples for the other half",
        }.get(count, count)
        yield f"| {name} | {' | '.join(cells)} | {median(errors_by(rows, measurements=count)):.1f} |"
    yield ""
    columns = ["model", "layers", "fingerprints s", "whole model s", "share %", *errors[:2], "memory: worst %"]
    columns += ["TTFT against itself", "TPOT against itself", "layer, short : whole"]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    layers: Mapping[str, int] = {row.model: row.layers for row in rows}
    for cost in costs:
        of_model = [row for row in rows if row.model == cost.model]
        ttft, tpot, memory = (errors_by(of_model, measurements="all", figure=figure) for figure in _FIGURES)
        itself = [_cell(errors_by(of_model, measurements=_ITSELF, figure=figure)) for figure in _FIGURES[:2]]
        share = 100 * cost.fingerprints_s / cost.whole_s
        yield (
            f"| {cost.model} | {layers[cost.model]} | {cost.fingerprints_s:.0f} | {cost.whole_s:.0f} | {share:.0f} | "
            f"{_cell(ttft)} | {_cell(tpot)} | {max(memory):.1f} | {' | '.join(itself)} | {cost.layer_ratio:.2f} |"
        )


def _counts(settings: Settings) -> list[str]:
    return ["0", *map(str, settings.measurements), "all"]


def _cell(errors: Sequence[float]) -> str:
    return f"{median(errors):.1f}, {max(errors):.1f}" if errors else ""


def missed_bars(rows: Sequence[Row], costs: Sequence[Cost], settings: Settings) -> Iterator[str]:
    """Yield what was not reached."""
    bars = settings.bars
    for figure in _FIGURES:
        errors = errors_by(rows, measurements="all", figure=figure)
        if median(errors) > bars.median_percent or max(errors) > bars.worst_percent:
            yield f"{figure}: median {median(errors):.1f} %, worst {max(errors):.1f} %"
    shares = [cost.fingerprints_s / cost.whole_s for cost in costs]
    if sum(cost.fingerprints_s for cost in costs) > bars.time_share * sum(cost.whole_s for cost in costs):
        yield f"fingerprints take {100 * median(shares):.0f} % of the time of whole models in the median"
    falling = [median(errors_by(rows, measurements=count)) for count in _counts(settings)]
    if falling != sorted(falling, reverse=True):
        yield f"errors by measurements do not fall: {', '.join(f'{error:.1f}' for error in falling)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
