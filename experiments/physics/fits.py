"""Which fields of engine presets are fitted to which measured times, and the errors of fits with a model left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import step_cases

from maveriq.calibration.engine_fit import StepSample, fit_preset, held_out_errors
from maveriq.estimate.engine_presets import EnginePreset, engine_preset
from maveriq.estimate.intervals import Family


@dataclass(frozen=True, slots=True)
class Fit:
    """What a preset is fitted to.

    Args:
        read: yields the cases.
        source: the source among them.
        groups: the groups that are fitted to; () for all. Other groups are predicted by the fit to these.
        free: the fields that are fitted.
    """

    read: Callable[..., Iterator[step_cases.Case]]
    source: str
    free: tuple[str, ...]
    groups: tuple[str, ...] = ()


_ONE_A_STEP = ("step_us", "sequence_us")
FITS: Mapping[str, Fit] = {
    "vllm-2023": Fit(step_cases.splitwise_batches, "splitwise", ("layer_us", "prefill_factor")),
    "vllm-2024": Fit(step_cases.static_batches, "Argonne vLLM", (*_ONE_A_STEP, "kernel_factor", "prefill_factor")),
    "vllm-2025": Fit(step_cases.steady_decode, "energy leaderboard", _ONE_A_STEP, (Family.DENSE, Family.EXPERTS)),
    "trtllm-0.9": Fit(step_cases.a6000_runs, "A6000", ("step_us",), ("TP 1",)),
    "trtllm-2024": Fit(
        step_cases.static_batches, "Argonne TensorRT-LLM", (*_ONE_A_STEP, "kernel_factor", "prefill_factor")
    ),
}
"""Presets that are fitted; the others come from elsewhere, as their source says."""


def compared(read: Sequence[step_cases.Case], source: str) -> list[tuple[step_cases.Case, StepSample]]:
    """Return the cases of a source that are compared, each with its sample."""
    return [(case, case.sample) for case in read if case.source == source and case.sample is not None]


def fitted(name: str, read: Sequence[step_cases.Case]) -> EnginePreset:
    """Return a preset fitted to all its cases."""
    fit = FITS[name]
    samples = [sample for case, sample in compared(read, fit.source) if not fit.groups or case.group in fit.groups]
    return fit_preset(samples, engine_preset(name), fit.free)


def left_out(name: str, read: Sequence[step_cases.Case]) -> list[tuple[step_cases.Case, float]]:
    """Return the cases of a preset's source, each with the error of a fit without its model."""
    fit = FITS[name]
    found = compared(read, fit.source)
    trained = [sample for case, sample in found if not fit.groups or case.group in fit.groups]
    errors = held_out_errors(trained, engine_preset(name), fit.free, judged=[sample for _, sample in found])
    return [(case, error) for (case, _), error in zip(found, errors, strict=True)]
