"""Compares estimates with measured latencies and memory: percentage errors and coverage of the intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from maveriq.calibration.measurements import Measurement, read_measurements
from maveriq.domain.models import ModelSpec, shape_of
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.calibrated import CalibratedEstimator
from maveriq.estimate.estimator import Estimator, LengthAwareMemory, MemoryIntervalAware, ServiceEstimate
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.estimate.intervals import Interval
from maveriq.estimate.registry import CALIBRATED, make_estimator
from maveriq.units import Bytes, gib


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedEstimator:
    """An estimator to evaluate, and the prompt length for rows without `prompt_tokens`."""

    estimator: Estimator
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Absolute percentage errors of `n` estimates, in percent."""

    n: int
    median: float
    mean: float
    p90: float
    p95: float
    worst: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Errors of the rows that share a value, such as `by` "tp" and `value` "4".

    `*_covered` is the percentage of rows within the estimate's 90 % interval, None if the estimator
    gives no interval. `memory` is None without an estimate.
    """

    by: str
    value: str
    latency: Errors
    memory: Errors | None
    latency_covered: float | None = None
    memory_covered: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedRows:
    """Rows that the estimator cannot estimate: the reason, their number, and the file and line of the first."""

    reason: str
    rows: int
    first: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Errors over a table: overall first, then group by group; no groups if every row was left out."""

    rows: int
    groups: tuple[Group, ...]
    left_out: tuple[SkippedRows, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """The errors of one estimate in percent, and whether the measurement lies in its intervals."""

    measured: Measurement
    latency_ape: float
    memory_ape: float | None
    latency_within: bool | None
    memory_within: bool | None


_GROUPINGS: tuple[tuple[str, Callable[[Measurement], str | int]], ...] = (
    ("all", lambda _: ""),
    ("model", lambda row: row.model_name),
    ("weights", lambda row: row.configuration.weights),
    ("weights/kv", lambda row: f"{row.configuration.weights}/{row.configuration.kv}"),
    ("tp", lambda row: row.configuration.tp),
    ("pp", lambda row: row.configuration.pp),
    ("batch", lambda row: row.configuration.batch_size),
    ("output tokens", lambda row: row.output_tokens),
)


def evaluate(table: Path, estimator: Estimator, *, prompt_tokens: int) -> Evaluation:
    """Compare an estimator with a table of measurements.

    Args:
        table: a table of measurements, a row per measured run.
        estimator: the estimator to compare.
        prompt_tokens: prompt length for rows without `prompt_tokens`.

    Raises:
        InputError: not such a table, or an impossible value in it.
    """
    evaluated = EvaluatedEstimator(estimator=estimator, prompt_tokens=prompt_tokens)
    return evaluate_rows(read_measurements(table), lambda _: evaluated)


def evaluate_rows(rows: Iterable[Measurement], estimator_of: Callable[[Measurement], EvaluatedEstimator]) -> Evaluation:
    """Compare measurements with estimates, each row with the estimator that `estimator_of` returns for it."""
    answers: list[Answer] = []
    left_out: dict[str, SkippedRows] = {}
    for measured in rows:
        answer = compare_row(measured, estimator_of(measured))
        if isinstance(answer, Answer):
            answers.append(answer)
        else:
            before = left_out.get(answer) or SkippedRows(reason=answer, rows=0, first=measured.where)
            left_out[answer] = replace(before, rows=before.rows + 1)
    total = len(answers) + sum(reason.rows for reason in left_out.values())
    return Evaluation(rows=total, groups=grouped_errors(answers), left_out=tuple(left_out.values()))


def grouped_errors(answers: list[Answer]) -> tuple[Group, ...]:
    """Return the errors of all answers, then group by group."""
    return tuple(group for by, key in _GROUPINGS for group in _grouped(answers, by, key))


def compare_row(measured: Measurement, evaluated: EvaluatedEstimator) -> Answer | str:
    """Return the errors of the estimate for a row, or the reason why the row has no estimate."""
    known = measured.model
    if known is None:
        return f"{measured.model_name} is not in the model catalogue"
    # Use the layers of the table: fingerprints of few layers are measurements too.
    model = replace(known, layers=measured.layers)
    reason = evaluated.estimator.why_not(model, measured.configuration)
    if reason is not None:
        return f"{model.name}: {reason}"
    try:
        return _compare(model, measured, evaluated)
    except InputError as error:
        return str(error)


def _compare(model: ModelSpec, measured: Measurement, evaluated: EvaluatedEstimator) -> Answer:
    configuration, estimator = measured.configuration, evaluated.estimator
    lengths = {
        "prompt_tokens": measured.prompt_tokens or evaluated.prompt_tokens,
        "output_tokens": measured.output_tokens,
    }
    service = estimator.service(model, configuration, **lengths, batch=configuration.batch_size)
    if isinstance(estimator, LengthAwareMemory):
        memory = estimator.memory_with(model, configuration, **lengths)
    else:
        memory = estimator.memory(model, configuration)
    memory_interval = None
    if isinstance(estimator, MemoryIntervalAware):
        memory_interval = estimator.memory_interval(model, configuration)
    return errors_of_estimate(
        measured,
        (service.latency_s, service.interval),
        (gib(memory), memory_interval),
    )


def errors_of_estimate(
    measured: Measurement, latency: tuple[float, Interval | None], memory: tuple[float, Interval | None] | None
) -> Answer:
    """Return the errors of an estimate.

    Args:
        measured: the measurement.
        latency: the estimate in seconds, and its interval.
        memory: the estimated memory in GiB with its interval, or None without an estimate.
    """
    latency_ratio = latency[0] / measured.latency_s
    memory_ratio = None if memory is None else memory[0] / measured.memory_gib
    return Answer(
        measured,
        100 * abs(latency_ratio - 1),
        None if memory_ratio is None else 100 * abs(memory_ratio - 1),
        latency[1] and latency[1].holds(latency[0], measured.latency_s),
        None if memory is None else memory[1] and memory[1].holds(memory[0], measured.memory_gib),
    )


def _grouped(answers: list[Answer], by: str, key: Callable[[Measurement], str | int]) -> Iterator[Group]:
    members: dict[str | int, list[Answer]] = {}
    for answer in answers:
        members.setdefault(key(answer.measured), []).append(answer)
    # Numbers are sorted; names keep the order of the table.
    numeric = all(isinstance(value, int) for value in members)
    for value in sorted(members) if numeric else members:
        memory = [answer.memory_ape for answer in members[value] if answer.memory_ape is not None]
        yield Group(
            by=by,
            value=str(value),
            latency=_summary([answer.latency_ape for answer in members[value]]),
            memory=_summary(memory) if memory else None,
            latency_covered=_covered([answer.latency_within for answer in members[value]]),
            memory_covered=_covered([answer.memory_within for answer in members[value]]),
        )


def _covered(within: list[bool | None]) -> float | None:
    known = [inside for inside in within if inside is not None]
    return 100 * sum(known) / len(known) if known else None


def _summary(percent: list[float]) -> Errors:
    return Errors(
        n=len(percent),
        median=float(np.median(percent)),
        mean=float(np.mean(percent)),
        p90=float(np.percentile(percent, 90)),
        p95=float(np.percentile(percent, 95)),
        worst=max(percent),
    )


class LeaveOneOutEstimator:
    """The calibrated estimator with, for each model, the calibration fitted without that model."""

    def __init__(self, profile: HardwareProfile) -> None:
        self._profile = profile
        self._without: dict[str, CalibratedEstimator] = {}

    @property
    def name(self) -> str:
        """Name in reports."""
        return "calibrated, each model left out"

    def why_not(self, model: ModelSpec, configuration: ParallelConfig) -> str | None:
        """Return why a configuration cannot be estimated, None if it can."""
        return self._for(model).why_not(model, configuration)

    def service(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> ServiceEstimate:
        """Estimate one batch of equal requests, as `CalibratedEstimator.service`."""
        return self._for(model).service(
            model, configuration, prompt_tokens=prompt_tokens, output_tokens=output_tokens, batch=batch
        )

    def memory(self, model: ModelSpec, configuration: ParallelConfig) -> Bytes:
        """Estimate the memory of a deployment, as `CalibratedEstimator.memory`."""
        return self._for(model).memory(model, configuration)

    def memory_with(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int
    ) -> Bytes:
        """Estimate the memory with requests of such lengths, as `CalibratedEstimator.memory_with`."""
        return self._for(model).memory_with(
            model, configuration, prompt_tokens=prompt_tokens, output_tokens=output_tokens
        )

    def memory_interval(self, model: ModelSpec, configuration: ParallelConfig) -> Interval:
        """Return the interval of memory, as `CalibratedEstimator.memory_interval`."""
        return self._for(model).memory_interval(model, configuration)

    def _for(self, model: ModelSpec) -> CalibratedEstimator:
        found = self._without.get(model.name)
        if found is None:
            found = CalibratedEstimator.benchmarked(self._profile, without_model=model.name)
            self._without[model.name] = found
        return found


EACH = "each"
"""Value of --leave-out that leaves out each model for its own rows."""


def benchmarked_estimator(name: str, profile: HardwareProfile, *, without_model: str | None = None) -> Estimator:
    """Return an estimator for comparison with a benchmark's tables, not with the live system.

    Args:
        name: a key of `ESTIMATORS`.
        profile: the profile it reads.
        without_model: a model whose ground truth its fit must not include; `EACH` for each model its own.

    Raises:
        UnknownNameError: no such estimator, or the profile has no such model.
        InputError: the estimator has no fits with models left out.
    """
    if name == CALIBRATED and without_model == EACH:
        return LeaveOneOutEstimator(profile)
    if name == CALIBRATED:
        left_out = None if without_model is None else _fingerprinted_model(without_model, profile)
        return CalibratedEstimator.benchmarked(profile, without_model=left_out)
    if without_model is not None:
        raise InputError(f"--leave-out {without_model}: only the calibrated estimator is fitted with models left out")
    return make_estimator(name, profile)


def _fingerprinted_model(name: str, profile: HardwareProfile) -> str:
    """Return the fingerprinted model of that name, or the fingerprinted base model of a variant."""
    known, shape = profile.fingerprints.models(), shape_of(name)
    if name in known:
        return name
    if shape is None or shape.name not in known:
        raise UnknownNameError("model to leave out", name, known, hint=f"or say {EACH!r}")
    return shape.name
