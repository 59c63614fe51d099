"""Cross-validation: fits a calibration without each model in turn; the errors give the calibration's margins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import msgspec
import numpy as np
from scipy.stats import norm, t

from maveriq.calibration.evaluation import Answer, Group, errors_of_estimate, grouped_errors
from maveriq.calibration.fitting import Table, fit_calibration, fit_memory, memory_of, trust_weights
from maveriq.calibration.samples import Constants, Sample, constants_of, nearest_fingerprints, without_ground_truth
from maveriq.domain.models import ModelSpec, WeightType
from maveriq.errors import InputError
from maveriq.estimate.calibrated import layer_time_ratio, measured_layers
from maveriq.estimate.calibration_file import Calibration, Margins
from maveriq.estimate.memory import MemoryEstimate, memory_interval

_UNKNOWN = math.log(2.0)  # the error assumed where none was measured
_QUANTILE = 93  # percentile of the errors on known models that covers 90 % of the errors on a new one


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutPrediction:
    """A sample and its prediction by a calibration fitted without the ground truth of its model.

    `memory` is None if the model has no fingerprint to predict memory from. `trust` is the weight of
    the row in the loss, 1 to 0.
    """

    sample: Sample
    latency_s: float
    memory: MemoryEstimate | None
    trust: float

    @property
    def latency_log_error(self) -> float:
        """Logarithm of predicted over measured latency."""
        return math.log(self.latency_s / self.sample.measured.latency_s)

    @property
    def memory_log_error(self) -> float | None:
        """Logarithm of predicted over measured memory."""
        return None if self.memory is None else math.log(self.memory.gib / self.sample.measured.memory_gib)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossFit:
    """A calibration fitted to all samples, one without each model, and the predictions of each for its model.

    `constants` are those of the fingerprints among the samples, by prompt length in tokens.
    """

    calibration: Calibration
    without: Mapping[str, Calibration]
    predictions: Sequence[HeldOutPrediction]
    constants: Mapping[int, Constants]

    def layer_time_ratio(self, model: ModelSpec, weights: WeightType) -> float:
        """Return measured over predicted time of a layer, from the model's fingerprints, weighted by `trust`."""
        layers = chain.from_iterable(
            measured_layers(constants.get(model.name, {}), model, weights, prompt_tokens=prompt_tokens)
            for prompt_tokens, constants in self.constants.items()
        )
        return math.exp(self.calibration.trust * layer_time_ratio(layers, self.calibration.roofline(weights, 1)))


def cross_fit(
    samples: Sequence[Sample], start: Calibration, on_fit: Callable[[str], None] = lambda _: None
) -> CrossFit:
    """Fit to all samples, and again with each model of the ground truth left out.

    Args:
        samples: as `read_samples` returns them.
        start: the start of every fit.
        on_fit: called with the name of each fit when it starts.

    Raises:
        InputError: the samples have only one model.
    """
    constants = constants_of(samples)
    models = list(dict.fromkeys(sample.model.name for sample in samples if not sample.is_fingerprint))
    if not without_ground_truth(samples, models[0]):
        raise InputError(
            f"{models[0]} is the only model measured; a fit needs a second one to be checked against: measure another"
        )
    without: dict[str, Calibration] = {}
    predictions: list[HeldOutPrediction] = []
    for model in models:
        on_fit(f"without {model}")
        without[model] = _fit(without_ground_truth(samples, model), start, constants)
        judged = [sample for sample in samples if sample.model.name == model and not sample.is_fingerprint]
        predictions.extend(_predictions(judged, without[model], constants))
    on_fit("all models")
    return CrossFit(
        calibration=_with_margins(_fit(samples, start, constants), predictions),
        # Margins of a model come from the errors on the other models.
        without={
            model: _with_margins(fitted, [sample for sample in predictions if sample.sample.model.name != model])
            for model, fitted in without.items()
        },
        predictions=predictions,
        constants=constants,
    )


def _fit(samples: Sequence[Sample], start: Calibration, constants: Mapping[int, Constants]) -> Calibration:
    fitted = fit_calibration(samples, start)
    return msgspec.structs.replace(fitted, memory=fit_memory(samples, start.memory, constants))


def _predictions(
    samples: Sequence[Sample], calibration: Calibration, constants: Mapping[int, Constants]
) -> Iterator[HeldOutPrediction]:
    table = Table(samples)
    layer_time_ratio = np.array([_layer_time_ratio(sample, calibration, constants) for sample in samples])
    predicted_s = table.predict(calibration, layer_time_ratio)
    trust = trust_weights(np.log(predicted_s / table.latency_s))
    for sample, latency_s, row_trust in zip(samples, predicted_s, trust, strict=True):
        memory = memory_of(sample, calibration.memory, constants)
        yield HeldOutPrediction(sample=sample, latency_s=float(latency_s), memory=memory, trust=float(row_trust))


def _layer_time_ratio(sample: Sample, calibration: Calibration, constants: Mapping[int, Constants]) -> float:
    weights, found = sample.measured.configuration.weights, nearest_fingerprints(sample, constants)
    if found is None:
        return 1.0
    prompt_tokens, fingerprints = found
    layers = measured_layers(fingerprints, sample.model, weights, prompt_tokens=prompt_tokens)
    return math.exp(calibration.trust * layer_time_ratio(layers, calibration.roofline(weights, 1)))


def _with_margins(calibration: Calibration, predictions: Sequence[HeldOutPrediction]) -> Calibration:
    single = [prediction for prediction in predictions if prediction.sample.measured.configuration.batch_size == 1]
    batched = [prediction for prediction in predictions if prediction.sample.measured.configuration.batch_size > 1]
    by_tp = {
        tp: _quantile(abs(prediction.latency_log_error) for prediction in single if _tp(prediction) == tp)
        for tp in calibration.tp
    }
    widest = max((found for found in by_tp.values() if found), default=_UNKNOWN)
    of_single = {tp: found or widest for tp, found in by_tp.items()}
    # At high TP batches were measured on one model only, so one factor for all TP widens the margins of batches.
    wider = max(
        1.0, _quantile(abs(prediction.latency_log_error) / of_single[_tp(prediction)] for prediction in batched) or 1.0
    )
    memory_single, memory_request = _memory_margins(single, batched)
    margins = Margins(
        memory_single=memory_single,
        memory_request=memory_request,
        single={tp: _margin(found) for tp, found in of_single.items()},
        batched={tp: _margin(wider * found) for tp, found in of_single.items()},
    )
    return msgspec.structs.replace(calibration, margins=margins)


def _memory_margins(single: Sequence[HeldOutPrediction], batched: Sequence[HeldOutPrediction]) -> tuple[float, float]:
    """Return the margin of memory, and the one for the share that further requests of a batch add."""
    known = _quantile(
        abs(prediction.memory_log_error) for prediction in single if prediction.memory_log_error is not None
    )
    per_share = _quantile(
        max(0.0, abs(prediction.memory_log_error) - (known or 0.0)) / prediction.memory.request_share
        for prediction in batched
        if prediction.memory is not None and prediction.memory_log_error is not None
    )
    return _margin(known), _margin(None if per_share is None else per_share * _few(batched))


def _few(predictions: Sequence[HeldOutPrediction]) -> float:
    """Return how much wider an interval for a new model must be when few models were measured (Student's t)."""
    models = len({prediction.sample.model.name for prediction in predictions})
    if models == 1:
        return 2.0  # the difference between models is unknown
    return float(t.ppf(0.95, models - 1) * math.sqrt(1 + 1 / models) / norm.ppf(0.95))


def _tp(prediction: HeldOutPrediction) -> str:
    return str(prediction.sample.measured.configuration.tp)


def _quantile(errors: Iterable[float]) -> float | None:
    """Return the `_QUANTILE` percentile of the errors, None if there are none."""
    known = list(errors)
    return float(np.percentile(known, _QUANTILE)) if known else None


def _margin(log_error: float | None) -> float:
    """Return a logarithmic error as a relative margin."""
    return round(math.expm1(_UNKNOWN if log_error is None else log_error), 4)


def errors_of(fitted: CrossFit) -> tuple[Group, ...]:
    """Return the errors on left-out models and the share of their rows that the margins cover, group by group."""
    return grouped_errors(
        [_compared(prediction, fitted.without[prediction.sample.model.name]) for prediction in fitted.predictions]
    )


def _compared(prediction: HeldOutPrediction, calibration: Calibration) -> Answer:
    margins, configuration = calibration.margins, prediction.sample.measured.configuration
    return errors_of_estimate(
        prediction.sample.measured,
        (prediction.latency_s, margins.latency_interval(configuration.tp, configuration.batch_size)),
        None if prediction.memory is None else (prediction.memory.gib, memory_interval(margins, prediction.memory)),
    )


def least_trusted(predictions: Sequence[HeldOutPrediction], count: int) -> list[tuple[str, float, float]]:
    """Return the rows with the least weight in the fit: file and line, measured and predicted seconds."""
    worst = sorted(predictions, key=lambda prediction: prediction.trust)[:count]
    return [
        (prediction.sample.measured.where, prediction.sample.measured.latency_s, prediction.latency_s)
        for prediction in worst
    ]
