"""What a study compares measured runs with: estimators of a profile, or formulas of the study's own fingerprints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from maveriq.calibration.evaluation import EACH, Answer, EvaluatedEstimator, benchmarked_estimator, compare_row
from maveriq.calibration.measurements import Measurement
from maveriq.domain.models import KvType, WeightType
from maveriq.estimate.fingerprints import Exponents
from maveriq.estimate.hardware_profile import HardwareProfile
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
