"""What a study compares measured runs with: estimators of a profile, or formulas of the study's own fingerprints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from maveriq.calibration.evaluation import (
    EACH,
    Answer,
    EvaluatedEstimator,
    benchmarked_estimator,
    compare_row,
    errors_of_estimate,
)
from maveriq.calibration.measurements import Measurement
from maveriq.calibration.samples import Constants, Sample, constants_of
from maveriq.domain.models import KvType, WeightType
from maveriq.estimate.fingerprints import Exponents, ParallelLatency, parallel_memory_gib
from maveriq.estimate.hardware_profile import HardwareProfile, load_profile
from maveriq.estimate.registry import CALIBRATED

Predict: TypeAlias = Callable[[Measurement], Answer | None]
"""The errors of a prediction of a measured run, None where there is no prediction."""

PAPER = "paper"
"""The paper's formula on fingerprints of the model."""

UNSEEN = "calibrated"
"""The calibrated estimator on fingerprints of the model, fitted to the whole models of others only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """What is known besides the measured runs.

    Args:
        exponents: of the paper's formula, by weight and KV type.
        by_name: predictions by the estimator's name.
        accuracy_percent: of the 16-bit model's, by model name, weight and KV type; None where it was never measured.
    """

    exponents: Mapping[tuple[WeightType, KvType], Exponents]
    by_name: Mapping[str, Predict]
    accuracy_percent: Callable[[str, WeightType, KvType], float | None]

    def answers(self, name: str, runs: Iterable[Measurement]) -> list[Answer]:
        """Return the errors of every run that an estimator predicts."""
        predict = self.by_name[name]
        return [answer for answer in map(predict, runs) if answer is not None]


def predictions_of(profile: HardwareProfile) -> Predictions:
    """Return the predictions of a profile's estimators."""
    estimators = {
        PAPER: benchmarked_estimator(PAPER, profile),
        UNSEEN: benchmarked_estimator(CALIBRATED, profile, without_model=EACH),
    }
    return Predictions(
        exponents=profile.fingerprints.exponents,
        by_name={
            name: partial(_predicted, EvaluatedEstimator(estimator=estimator, prompt_tokens=profile.prompt_tokens))
            for name, estimator in estimators.items()
        },
        accuracy_percent=profile.accuracy,
    )


def _predicted(evaluated: EvaluatedEstimator, run: Measurement) -> Answer | None:
    answer = compare_row(run, evaluated)
    return answer if isinstance(answer, Answer) else None


PUBLISHED_PROFILE = "a6000-long"
"""The profile whose exponents the paper's formula takes on other hardware too."""


def predictions_from(fingerprints: Iterable[Measurement]) -> Predictions:
    """Return the predictions of the paper's formula from measured fingerprints; none without fingerprints."""
    constants = constants_of(samples_of(fingerprints, is_fingerprint=True))
    exponents = load_profile(PUBLISHED_PROFILE).fingerprints.exponents
    return Predictions(
        exponents=exponents,
        by_name={PAPER: partial(_by_formula, constants, exponents)} if constants else {},
        accuracy_percent=lambda _model, _weights, _kv: None,
    )


def samples_of(runs: Iterable[Measurement], *, is_fingerprint: bool) -> Iterator[Sample]:
    """Yield measured runs as samples of equal weight; runs of unknown models are left out."""
    for run in runs:
        model = run.model
        if model is not None and run.prompt_tokens is not None:
            yield Sample(
                table="",
                measured=run,
                model=replace(model, layers=run.layers),
                prompt_tokens=run.prompt_tokens,
                sample_weight=1.0,
                is_fingerprint=is_fingerprint,
            )


def _by_formula(
    constants: Mapping[int, Constants], exponents: Mapping[tuple[WeightType, KvType], Exponents], run: Measurement
) -> Answer | None:
    """Return the errors of the paper's formula, None for a batch or without a fingerprint that it needs."""
    configuration = run.configuration
    tp, pp = configuration.tp, configuration.pp
    points = constants.get(run.prompt_tokens or 0, {}).get(run.model_name, {})
    kind = configuration.weights, configuration.kv
    needed = [configuration.at(1, 1)] + [configuration.at(2, 1)] * (tp > 1) + [configuration.at(1, 2)] * (pp > 1)
    if configuration.batch_size > 1 or kind not in exponents or any(point not in points for point in needed):
        return None
    single, tp2, pp2 = (points.get(configuration.at(*at)) for at in ((1, 1), (2, 1), (1, 2)))
    if single is None:
        return None
    latency = ParallelLatency.scaled(
        single.line(run.layers), None if tp2 is None else tp2.line(run.layers), exponents[kind], tp=tp, pp=pp
    )
    memory_gib = parallel_memory_gib(
        single.memory_gib(run.layers),
        None if tp2 is None else tp2.memory_gib(run.layers),
        None if pp2 is None else pp2.memory_gib(run.layers),
        tp=tp,
        pp=pp,
    )
    return errors_of_estimate(run, (latency.at(run.output_tokens), None), (memory_gib, None))
