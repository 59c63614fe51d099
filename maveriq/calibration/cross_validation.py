"""Cross-validation: fits with each model left out in turn, whose errors give the margins of the calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import msgspec
import numpy as np
from scipy.stats import norm, t

from maveriq.calibration.evaluation import Answer, Group, compared, grouped
from maveriq.calibration.fitting import Table, fit_calibration, fit_memory, held_by, trust_of
from maveriq.calibration.samples import Constants, Sample, constants_of, nearest_fingerprints, usable
from maveriq.domain.models import ModelSpec, WeightType
from maveriq.errors import InputError
from maveriq.estimate.calibrated import layer_time_ratio, measured_layers
from maveriq.estimate.calibration_file import Calibration, Margins
from maveriq.estimate.memory import MemoryEstimate, memory_margin

_UNKNOWN = math.log(2.0)  # the error where none was ever seen
_QUANTILE = 93  # percent of the errors on known models that hold 90 % of those on the next one


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutPrediction:
    """A sample and what was predicted of it by a calibration that had not seen its model's ground truth.

    `held` is None where the model has no fingerprint to predict memory from.
    """

    sample: Sample
    latency_s: float
    held: MemoryEstimate | None
    trust: float

    @property
    def latency_log_error(self) -> float:
        """Logarithm of predicted over measured latency."""
        return math.log(self.latency_s / self.sample.measured.latency_s)

    @property
    def memory_log_error(self) -> float | None:
        """Logarithm of predicted over measured memory."""
        return None if self.held is None else math.log(self.held.gib / self.sample.measured.memory_gib)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossFit:
    """A calibration fitted to all samples, one per model left out, and how those did on their model.

    `constants` are those of the fingerprints among the samples, by the length of their prompts.
    """

    calibration: Calibration
    without: Mapping[str, Calibration]
    answered: Sequence[HeldOutPrediction]
    constants: Mapping[int, Constants]

    def layer_time_ratio(self, model: ModelSpec, weights: WeightType) -> float:
        """Return a layer's time over what the law says, as far as the model's fingerprints are believed."""
        seen = chain.from_iterable(
            measured_layers(constants.get(model.name, {}), model, weights, prompt_tokens=prompt_tokens)
            for prompt_tokens, constants in self.constants.items()
        )
        return math.exp(self.calibration.trust * layer_time_ratio(seen, self.calibration.law(weights, 1)))


def cross_fit(
    samples: Sequence[Sample], start: Calibration, on_fit: Callable[[str], None] = lambda _: None
) -> CrossFit:
    """Fit to all samples, and again with each model of the ground truth left out.

    Args:
        samples: as `read_samples` gives them.
        start: where every fit begins.
        on_fit: called with the name of each fit as it begins.

    Raises:
        InputError: there is one model alone.
    """
    constants = constants_of(samples)
    models = list(dict.fromkeys(one.model.name for one in samples if not one.is_fingerprint))
    if not usable(samples, models[0]):
        raise InputError(f"{models[0]} is the only model measured; a fit is judged on models left out: measure another")
    without: dict[str, Calibration] = {}
    answered: list[HeldOutPrediction] = []
    for model in models:
        on_fit(f"without {model}")
        without[model] = _fit(usable(samples, model), start, constants)
        judged = [one for one in samples if one.model.name == model and not one.is_fingerprint]
        answered.extend(_answers(judged, without[model], constants))
    on_fit("all models")
    return CrossFit(
        calibration=_with_margins(_fit(samples, start, constants), answered),
        # Margins of a model come from the errors on the other models.
        without={
            model: _with_margins(fitted, [one for one in answered if one.sample.model.name != model])
            for model, fitted in without.items()
        },
        answered=answered,
        constants=constants,
    )


def _fit(samples: Sequence[Sample], start: Calibration, constants: Mapping[int, Constants]) -> Calibration:
    fitted = fit_calibration(samples, start)
    return msgspec.structs.replace(fitted, memory=fit_memory(samples, start.memory, constants))


def _answers(
    judged: Sequence[Sample], calibration: Calibration, constants: Mapping[int, Constants]
) -> Iterator[HeldOutPrediction]:
    table = Table(judged)
    layer_time_ratio = np.array([_layer_time_ratio(one, calibration, constants) for one in judged])
    predicted_s = table.predict(calibration, layer_time_ratio)
    trust = trust_of(np.log(predicted_s / table.latency_s))
    for one, latency_s, service_estimator in zip(judged, predicted_s, trust, strict=True):
        seen = held_by(one, calibration.memory, constants)
        yield HeldOutPrediction(sample=one, latency_s=float(latency_s), held=seen, trust=float(service_estimator))


def _layer_time_ratio(sample: Sample, calibration: Calibration, constants: Mapping[int, Constants]) -> float:
    weights, found = sample.measured.configuration.weights, nearest_fingerprints(sample, constants)
    if found is None:
        return 1.0
    prompt_tokens, fingerprints = found
    seen = measured_layers(fingerprints, sample.model, weights, prompt_tokens=prompt_tokens)
    return math.exp(calibration.trust * layer_time_ratio(seen, calibration.law(weights, 1)))


def _with_margins(calibration: Calibration, answered: Sequence[HeldOutPrediction]) -> Calibration:
    single = [one for one in answered if one.sample.measured.configuration.batch_size == 1]
    batched = [one for one in answered if one.sample.measured.configuration.batch_size > 1]
    by_tp = {tp: _quantile(abs(one.latency_log_error) for one in single if _tp(one) == tp) for tp in calibration.tp}
    widest = max((found for found in by_tp.values() if found), default=_UNKNOWN)
    of_single = {tp: found or widest for tp, found in by_tp.items()}
    # Batches were measured on several models at low TP, on one at high TP: how much they widen errors is one factor.
    wider = max(1.0, _quantile(abs(one.latency_log_error) / of_single[_tp(one)] for one in batched) or 1.0)
    margins = Margins(
        **_memory_margins(single, batched),
        single={tp: _margin(found) for tp, found in of_single.items()},
        batched={tp: _margin(wider * found) for tp, found in of_single.items()},
    )
    return msgspec.structs.replace(calibration, margins=margins)


def _memory_margins(single: Sequence[HeldOutPrediction], batched: Sequence[HeldOutPrediction]) -> dict[str, float]:
    known = _quantile(abs(one.memory_log_error) for one in single if one.memory_log_error is not None)
    per_share = _quantile(
        max(0.0, abs(one.memory_log_error) - (known or 0.0)) / one.held.request_share
        for one in batched
        if one.held is not None and one.memory_log_error is not None
    )
    return {
        "memory_single": _margin(known),
        "memory_request": _margin(None if per_share is None else per_share * _few(batched)),
    }


def _few(answered: Sequence[HeldOutPrediction]) -> float:
    """Return how much wider an interval must be for a new model where few models were seen (Student's t)."""
    models = len({one.sample.model.name for one in answered})
    if models == 1:
        return 2.0  # nothing is known of how models differ
    return float(t.ppf(0.95, models - 1) * math.sqrt(1 + 1 / models) / norm.ppf(0.95))


def _tp(one: HeldOutPrediction) -> str:
    return str(one.sample.measured.configuration.tp)


def _quantile(errors: Iterable[float]) -> float | None:
    """Return what the given share of the errors stays below, None where there is none."""
    known = list(errors)
    return float(np.percentile(known, _QUANTILE)) if known else None


def _margin(log_error: float | None) -> float:
    """Return a margin of a logarithmic error."""
    return round(math.expm1(_UNKNOWN if log_error is None else log_error), 4)


def errors_of(fitted: CrossFit) -> tuple[Group, ...]:
    """Return the errors on models left out, and how many of their rows the margins cover, group by group."""
    return grouped([_compared(one, fitted.without[one.sample.model.name]) for one in fitted.answered])


def _compared(one: HeldOutPrediction, calibration: Calibration) -> Answer:
    margins, asked = calibration.margins, one.sample.measured.configuration
    single = asked.batch_size == 1
    return compared(
        one.sample.measured,
        (one.latency_s, (margins.single if single else margins.batched)[str(asked.tp)]),
        None if one.held is None else (one.held.gib, memory_margin(margins, one.held)),
    )


def least_trusted(answered: Sequence[HeldOutPrediction], count: int) -> list[tuple[str, float, float]]:
    """Return the rows that the fit believes least: where they stand, measured and predicted seconds."""
    worst = sorted(answered, key=lambda one: one.trust)[:count]
    return [(one.sample.measured.where, one.sample.measured.latency_s, one.latency_s) for one in worst]
