"""The fit of engine presets recovers what made the times, and predicts models that it did not see."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from maveriq.calibration.engine_fit import StepSample, fit_preset, held_out_errors
from maveriq.errors import InputError
from maveriq.estimate.engine_presets import EnginePreset, engine_preset

TRUTH = msgspec.structs.replace(
    engine_preset("vllm-2024"), step_us=900.0, sequence_us=40.0, kernel_factor=1.1, prefill_factor=1.4
)
START = msgspec.structs.replace(TRUTH, step_us=100.0, sequence_us=1.0, kernel_factor=1.0, prefill_factor=1.0)
FREE = ("step_us", "sequence_us", "kernel_factor", "prefill_factor")


def samples(made_by: EnginePreset) -> list[StepSample]:
    found = []
    for model, kernels_us in (("small", 2000.0), ("middle", 6000.0), ("large", 20000.0)):
        for batch in (1, 8, 64):
            for output in (8, 128):
                sample = StepSample(
                    model=model, measured_us=1.0, layers=32, decode_steps=output - 1,
                    decode_us=kernels_us * (1 + batch / 100), decode_sequences=batch, prefill_steps=1,
                    prefill_us=kernels_us * batch, prefill_sequences=batch,
                )  # fmt: skip
                found.append(measured_as(sample, sample.predicted_us(made_by)))
    return found


def measured_as(sample: StepSample, measured_us: float) -> StepSample:
    return replace(sample, measured_us=measured_us)


def test_a_fit_recovers_the_preset_behind_the_times() -> None:
    fitted = fit_preset(samples(TRUTH), START, FREE)
    for name in FREE:
        assert getattr(fitted, name) == pytest.approx(getattr(TRUTH, name), rel=0.02)
    assert fitted.api_us == START.api_us


def test_host_bound_steps_show_the_time_of_a_layer() -> None:
    truth = msgspec.structs.replace(TRUTH, layer_us=400.0, step_us=0.0, sequence_us=0.0)
    fitted = fit_preset(samples(truth), msgspec.structs.replace(truth, layer_us=50.0), ("layer_us",))
    assert fitted.layer_us == pytest.approx(400.0, rel=0.02)


def test_a_model_left_out_is_predicted_by_the_others() -> None:
    errors = held_out_errors(samples(TRUTH), START, FREE)
    assert np.abs(errors).max() < 0.02
    odd = [measured_as(s, s.measured_us * (2 if s.model == "large" else 1)) for s in samples(TRUTH)]
    off = [
        error for sample, error in zip(odd, held_out_errors(odd, START, FREE), strict=True) if sample.model == "large"
    ]
    assert np.median(off) == pytest.approx(-np.log(2), abs=0.02)


def test_nothing_to_fit_is_refused() -> None:
    with pytest.raises(InputError, match="no samples"):
        fit_preset([], START, FREE)
    with pytest.raises(InputError, match="no field 'api_us'"):
        fit_preset(samples(TRUTH), START, ("api_us",))
