"""Fits engine presets to measured times: what an engine's process adds to kernels that are known.

A sample is one measured time that consists of steps of two sorts, those that hold prefill and those that only decode.
The loss is a soft L1 of the logarithm, so that a few odd runs do not decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from scipy.optimize import least_squares

from maveriq.errors import InputError
from maveriq.estimate.engine_presets import EnginePreset
from maveriq.estimate.log_grid import Array

_SOFT_ERROR = 0.1  # logarithmic; errors beyond it count linearly
_BOUNDS: Mapping[str, tuple[float, float]] = {
    "step_us": (0.0, 5000.0),
    "sequence_us": (0.0, 300.0),
    "layer_us": (0.0, 2000.0),
    "kernel_factor": (0.6, 2.5),
    "prefill_factor": (0.6, 2.5),
}
"""Fields of a preset that can be fitted, and the values that they can take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSample:
    """A measured time, and the steps that it consists of.

    Args:
        model: what is left out together in cross-validation.
        measured_us: the time.
        layers: layers of the model.
        decode_steps: steps that only decode, each with kernels of `decode_us` and `decode_sequences` sequences.
        prefill_steps: the same of steps that hold prefill.
    """

    model: str
    measured_us: float
    layers: int
    decode_steps: float = 0.0
    decode_us: float = 0.0
    decode_sequences: float = 0.0
    prefill_steps: float = 0.0
    prefill_us: float = 0.0
    prefill_sequences: float = 0.0

    def predicted_us(self, preset: EnginePreset) -> float:
        """Return the time that a preset predicts."""
        decode_us = preset.step_time_us(
            self.decode_us, sequences=self.decode_sequences, has_prefill=False, layers=self.layers
        )
        prefill_us = preset.step_time_us(
            self.prefill_us, sequences=self.prefill_sequences, has_prefill=True, layers=self.layers
        )
        return float(self.decode_steps * decode_us + self.prefill_steps * prefill_us)

    def log_error(self, preset: EnginePreset) -> float:
        """Return the logarithm of the predicted over the measured time."""
        return float(np.log(self.predicted_us(preset) / self.measured_us))


def fit_preset(samples: Sequence[StepSample], start: EnginePreset, free: Sequence[str]) -> EnginePreset:
    """Return a preset with some fields fitted.

    Args:
        samples: what to fit to; each counts the same.
        start: the other fields, and where the fit starts.
        free: the fields to fit, among `step_us`, `sequence_us`, `layer_us`, `kernel_factor`, `prefill_factor`.

    Raises:
        InputError: no sample, or a field that cannot be fitted.
    """
    unknown = [name for name in free if name not in _BOUNDS]
    if unknown or not samples:
        raise InputError(f"fit of an engine preset: {f'no field {unknown[0]!r}' if unknown else 'no samples'}")
    predict = _predictor(samples)
    measured = np.log([sample.measured_us for sample in samples])
    low, high = (np.asarray([_BOUNDS[name][end] for name in free]) for end in (0, 1))
    scale = np.asarray([100.0 if name.endswith("_us") else 1.0 for name in free])

    def errors(values: Array) -> Array:
        return np.asarray(np.log(predict(_with(start, free, values * scale))) - measured)

    first = np.clip([getattr(start, name) for name in free], low + 1e-3, high - 1e-3) / scale
    found = least_squares(
        errors, first, bounds=(low / scale, high / scale), loss="soft_l1", f_scale=_SOFT_ERROR, x_scale="jac"
    )
    return _with(start, free, found.x * scale)


def held_out_errors(
    samples: Sequence[StepSample],
    start: EnginePreset,
    free: Sequence[str],
    *,
    judged: Sequence[StepSample] | None = None,
) -> list[float]:
    """Return the logarithmic error of each judged sample under a fit to the samples of the other models.

    Args:
        samples: what to fit to.
        start: as for `fit_preset`.
        free: as for `fit_preset`.
        judged: the samples that are predicted; left out, the same.
    """
    judged = samples if judged is None else judged
    fits = {
        model: fit_preset([sample for sample in samples if sample.model != model], start, free)
        for model in dict.fromkeys(sample.model for sample in judged)
    }
    return [sample.log_error(fits[sample.model]) for sample in judged]


def _with(preset: EnginePreset, names: Sequence[str], values: Iterable[float]) -> EnginePreset:
    return msgspec.structs.replace(preset, **dict(zip(names, map(float, values), strict=True)))


def _predictor(samples: Sequence[StepSample]) -> Callable[[EnginePreset], Array]:
    """Return `StepSample.predicted_us` for all samples at once."""
    column = {
        name: np.asarray([getattr(sample, name) for sample in samples], dtype=np.float64)
        for name in ("layers", *(f"{sort}_{what}" for sort in ("decode", "prefill") for what in _PARTS))
    }

    def predict(preset: EnginePreset) -> Array:
        total = np.zeros(len(samples))
        for sort in ("decode", "prefill"):
            times = preset.step_time_us(
                column[f"{sort}_us"],
                sequences=column[f"{sort}_sequences"],
                has_prefill=sort == "prefill",
                layers=column["layers"],
            )
            total = total + column[f"{sort}_steps"] * times
        return total

    return predict


_PARTS = ("steps", "us", "sequences")
