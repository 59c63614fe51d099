"""Carries out a study on the engines of this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from maveriq.calibration.measurements import Measurement, MeasurementCost
from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.study.analyses import Analysis, check_definition
from maveriq.study.bench import Bench
from maveriq.study.definition import Definition
from maveriq.study.grid import EngineKey, Point, points_of
from maveriq.study.measurement_log import LOG_NAME, MeasuredPoint, open_log
from maveriq.study.predictions import predictions_from
from maveriq.study.result import StudyResult
from maveriq.study.runs import Runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a study measures here.

    Args:
        points: the measurements by the part that they play.
        left_out: the engines that cannot run here, by the reason.
    """

    points: Mapping[str, Sequence[Point]]
    left_out: Mapping[str, Sequence[EngineKey]]

    @property
    def all_points(self) -> list[Point]:
        """Every measurement once."""
        return list(dict.fromkeys(point for points in self.points.values() for point in points))

    @property
    def engines(self) -> int:
        """How many engines are started."""
        return len({point.engine for point in self.all_points})

    def notes(self) -> Iterator[str]:
        """Yield a line for each reason why something is not measured."""
        for reason, engines in self.left_out.items():
            count = "1 engine is" if len(engines) == 1 else f"{len(engines)} engines are"
            yield f"{count} left out, {engines[0].configuration} the first: {reason}"


def plan_of(name: str, definition: Definition, bench: Bench) -> Plan:
    """Return what a study measures here.

    Raises:
        InputError: the study measures nothing, its definition is damaged, or a part of it cannot run here.
    """
    analysis = check_definition(definition)
    if definition.measure is None:
        raise InputError(f"study {name} measures nothing; give --from-data, or add [[measure.grids]] to its file")
    points: dict[str, dict[Point, None]] = {}
    left_out: dict[str, dict[EngineKey, None]] = {}
    reasons: dict[EngineKey, str | None] = {}
    for grid in definition.measure.grids:
        for point in points_of(grid, bench.model.layers):
            if point.engine not in reasons:
                reasons[point.engine] = bench.why_not(point.engine)
            reason = reasons[point.engine]
            if reason is None:
                points.setdefault(grid.part, {})[point] = None
            else:
                left_out.setdefault(reason, {})[point.engine] = None
    _check_parts(name, analysis, points, left_out)
    return Plan(
        points={part: list(of_part) for part, of_part in points.items()},
        left_out={reason: list(engines) for reason, engines in left_out.items()},
    )


def _check_parts(name: str, analysis: Analysis, points: Iterable[str], left_out: Iterable[str]) -> None:
    absent = [part for part in analysis.parts if part not in points]
    if absent:
        why = next(iter(left_out), "no grid of its file describes it")
        raise InputError(f"study {name}: nothing of {', '.join(absent)} can be measured here: {why}")


def study_measured(name: str, definition: Definition, bench: Bench, folder: Path) -> StudyResult:
    """Measure what is missing of a study, and analyse it.

    Args:
        name: of the study.
        definition: what to measure, and how to analyse it.
        bench: what to measure with.
        folder: of the log; measurements that it has are not made again.

    Raises:
        InputError: as for `plan_of`, or the folder has measurements of something else.
        ProfilingError: an engine failed; what was measured before is kept.
    """
    plan = plan_of(name, definition, bench)
    analysis, measure = check_definition(definition), definition.measure
    with open_log(folder, bench.subject(name)) as log:
        bench.measure_all(plan.all_points, log)
        runs: Runs = {
            part: [_run(log.points[point], bench.model, folder / LOG_NAME) for point in points]
            for part, points in plan.points.items()
        }
    options = {**analysis.options, **definition.options, **(measure.options if measure else {})}
    result = analysis.run(runs, predictions_from(runs.get("fingerprints", ())), options)
    return replace(result, notes=(*result.notes, *plan.notes()))


def _run(measured: MeasuredPoint, model: ModelSpec, log: Path) -> Measurement:
    engine = measured.point.engine
    return Measurement(
        where=str(log),
        model_name=f"{model.name}-{engine.pruning}" if engine.pruning else model.name,
        layers=engine.layers,
        configuration=ParallelConfig(
            tp=engine.tp, pp=engine.pp, weights=engine.weights, kv=engine.kv, batch_size=engine.batch
        ),
        output_tokens=measured.point.output_tokens,
        latency_s=measured.latency_s,
        memory_gib=measured.memory_gib,
        prompt_tokens=measured.point.prompt_tokens,
        shape=model,
        layer_split=engine.layer_split,
        cost=MeasurementCost(
            model_build_s=measured.model_build_s, engine_build_s=measured.engine_build_s, run_s=measured.run_s
        ),
    )
