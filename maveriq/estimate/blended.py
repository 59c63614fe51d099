"""The estimator of profiles that `maveriq profile` plans: the physics estimate, corrected by what was measured.

At a measured point it returns the measurement, within its noise; near it the physics estimate times nearly the same
factors; without measurements the physics estimate itself. Short models tell the time of a layer apart from the rest, so
that whole models follow from fingerprints (`maveriq.estimate.blending`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.blending import Blend, Corrected, Measured, Scales
from maveriq.estimate.computed_parts import (
    ADMISSION,
    ATTENTION,
    CACHE,
    HAND_OVER,
    LAYERS,
    REST,
    SHARING,
    ComputedParts,
)
from maveriq.estimate.estimator import Basis, ServiceEstimate, check_estimable
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.estimate.intervals import Interval
from maveriq.estimate.log_grid import Array, LogGrid
from maveriq.estimate.observations import Batch, Observation
from maveriq.estimate.physics import PhysicsEstimator
from maveriq.estimate.step_time import GriddedSteps
from maveriq.units import Bytes

TIME_SCALES: Mapping[str, Scales] = {
    REST: Scales(common=0.8, phase=0.6, doubling=1.0),
    SHARING: Scales(common=0.8, phase=0.5, doubling=0.3),
    HAND_OVER: Scales(common=0.8, phase=0.5),
    ADMISSION: Scales(
        common=0.05, phase=0.0, size=0.05, stored_as=0.0, stored_size=0.0, doubling=0.0, model=0.0, kind=0.0
    ),
}
"""Launches, the API and links between GPUs are further off than the kernels of layers. Admission was measured."""

MEMORY_SCALES: Mapping[str, Scales] = {
    LAYERS: Scales(common=0.1, phase=0.0, size=0.0, stored_as=0.2, stored_size=0.0, doubling=0.0, model=0.1, kind=0.1),
    CACHE: Scales(common=0.2, phase=0.0, size=0.05, stored_as=0.3, stored_size=0.0, doubling=0.0, model=0.1, kind=0.1),
    REST: Scales(common=1.0, phase=0.0, size=0.4, stored_as=0.1, stored_size=0.1, doubling=0.0, model=0.3),
    SHARING: Scales(common=0.5, phase=0.0, size=0.1, stored_as=0.0, stored_size=0.0, doubling=0.2, model=0.2),
}
"""Bytes of weights and cache are counted; what an engine holds beside them is a guess."""

# Stages of few layers do not hide what handing over takes, as those of whole models do (docs/profiling.md).
_SHORT_STAGE, _SHORT_STAGES_NOISE = 4, 0.3

_FIRST, _TOKEN = 0, 1  # the times of `ComputedParts.times`
_LENGTH_STEPS = 0.02  # lengths whose logarithms differ by less are corrected alike
_OUTPUT_TOKENS = 20

# Between these sizes and those that were measured, factors of steps are interpolated.
_SEQUENCES = (1, 4, 16, 64, 256, 1024, 4096)
_CONTEXTS = (1, 32, 256, 2048, 16_384, 262_144)
_ROWS = (1, 16, 64, 256, 1024, 4096, 16_384, 65_536)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFactors:
    """By how much the steps of a configuration differ from the computed ones.

    Args:
        decode: of a step that decodes: sequences, and tokens that each attends to.
        dense: of a step that holds prompts alone, by tokens: layers, with what attention takes for any prompt.
        attention: of what attention takes for the length of a prompt, by its tokens.
        rest: of what does not belong to layers: output and host, by tokens of the step.
        of_length_us: at the points of `attention`, the computed time to which it applies.
        sequences: numbers of decoding sequences that were measured, ascending.
        contexts: tokens that measured sequences attended to, ascending.
        rows: tokens of measured steps that hold prompts, ascending.
    """

    decode: LogGrid
    dense: LogGrid
    attention: LogGrid
    rest: LogGrid
    of_length_us: Array
    sequences: tuple[int, ...]
    contexts: tuple[int, ...]
    rows: tuple[int, ...]


class BlendedEstimator:
    """Estimates as physics does, corrected by the profile's measurements.

    Args:
        profile: with the measurements.
        physics: what is corrected; None for that of the profile.
    """

    def __init__(self, profile: HardwareProfile, physics: PhysicsEstimator | None = None) -> None:
        self._profile = profile
        self._physics = physics or PhysicsEstimator(profile)
        self._parts = ComputedParts(self._physics, profile.admission_s)
        self._factors: dict[tuple[int, ModelSpec, ParallelConfig, int, int], Corrected] = {}

    @property
    def name(self) -> str:
        """The name by which `--estimator` and `--service-times` know it."""
        return "blended"

    def why_not(self, model: ModelSpec, configuration: ParallelConfig) -> str | None:
        """Return why this configuration cannot be estimated or run here, None if it can."""
        return self._profile.why_other_model(model) or self._physics.why_not(model, configuration)

    def configurations(self, model: ModelSpec, *, gpus: int, batch_size: int) -> Iterable[ParallelConfig]:
        """Return the configurations for up to so many GPUs, in the order that breaks ties."""
        return self._physics.configurations(model, gpus=gpus, batch_size=batch_size)

    def service(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> ServiceEstimate:
        """Estimate one batch of `batch` equal requests that start together on an idle engine.

        Raises:
            InputError: the configuration has a reason in `why_not`, or fewer than one token or request.
        """
        lengths = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "batch": batch}
        computed = self._physics.service(model, configuration, **lengths)
        if not self._profile.observed:
            return computed
        at = (model, replace(configuration.at_any_place(), batch_size=1), batch)
        first = self._correction(_FIRST, *at, prompt_tokens)
        token = self._correction(_TOKEN, *at, prompt_tokens + output_tokens // 2)
        first_s, tpot_s = computed.first_token_s * first.value, computed.tpot_s * token.value
        return ServiceEstimate(
            ttft_s=first_s - tpot_s,
            tpot_s=tpot_s,
            output_tokens=output_tokens,
            interval=_together(first, first_s, token, (output_tokens - 1) * tpot_s),
            basis=Basis.MEASURED if self._profile.has_measured(model) else computed.basis,
        )

    def service_interval(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> Interval:
        """Return the factors between which the time of a request lies in 90 of 100 cases.

        The arguments are those of `service`; the interval does not depend on how requests share steps.

        Raises:
            InputError: as `service`.
        """
        lengths = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "batch": batch}
        interval = self.service(model, configuration, **lengths).interval
        return interval if interval is not None else Interval(1.0, 1.0)

    def memory(self, model: ModelSpec, configuration: ParallelConfig) -> Bytes:
        """Estimate the memory over all GPUs of a deployment whose requests have the profile's length of prompts.

        Raises:
            InputError: the configuration has a reason in `why_not`.
        """
        return self.memory_with(
            model, configuration, prompt_tokens=self._profile.prompt_tokens, output_tokens=_OUTPUT_TOKENS
        )

    def memory_with(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int
    ) -> Bytes:
        """Estimate the memory as `memory`, with each request of a batch at the given lengths.

        Raises:
            InputError: the configuration has a reason in `why_not`.
        """
        lengths = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
        if not self._profile.observed:
            return self._physics.memory_with(model, configuration, **lengths)
        return math.ceil(self._memory(model, configuration, **lengths).value)

    def memory_interval(self, model: ModelSpec, configuration: ParallelConfig) -> Interval:
        """Return the factors of the estimate between which the memory lies in 90 of 100 cases."""
        lengths = {"prompt_tokens": self._profile.prompt_tokens, "output_tokens": _OUTPUT_TOKENS}
        return self._memory(model, configuration, **lengths).interval

    def why_no_room(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int
    ) -> str | None:
        """Return why a batch of requests of these lengths does not fit the KV cache; None if it does.

        Raises:
            InputError: the configuration has a reason in `why_not`.
        """
        return self._physics.why_no_room(model, configuration, prompt_tokens=prompt_tokens, output_tokens=output_tokens)

    @property
    def mixed_steps(self) -> list[Observation]:
        """What was measured with steps that hold a prompt beside decoding sequences."""
        return [seen for seen in self._profile.observed if seen.mixed_s is not None]

    def computed_steps(self, model: ModelSpec, configuration: ParallelConfig) -> GriddedSteps:
        """Return the computed time of the kernels of steps.

        Raises:
            InputError: the configuration has a reason in `why_not`.
        """
        check_estimable(self._physics, model, configuration)
        return self._physics.step_model(model, configuration)

    def step_factors(self, model: ModelSpec, configuration: ParallelConfig) -> StepFactors:
        """Return by how much the steps of an engine differ from the computed ones.

        Raises:
            InputError: the configuration has a reason in `why_not`.
        """
        check_estimable(self, model, configuration)
        of = replace(configuration.at_any_place(), batch_size=1)
        seen = [observed.batch for observed in self._profile.observed]
        sequences, contexts, rows = (
            tuple(sorted({*found}))
            for found in (
                [batch.size for batch in seen if batch.output_tokens > 1],
                [batch.prompt_tokens + batch.output_tokens // 2 for batch in seen if batch.output_tokens > 1],
                [batch.size * batch.prompt_tokens for batch in seen],
            )
        )
        axes = tuple(_axis(usual, found) for usual, found in ((_SEQUENCES, sequences), (_CONTEXTS, contexts)))
        decode = [
            [math.log(self._correction(_TOKEN, model, of, int(size), int(tokens)).value) for tokens in axes[1]]
            for size in axes[0]
        ]
        by_rows = _axis(_ROWS, rows)
        longest = max((batch.prompt_tokens for batch in seen), default=1)
        dense, attention, rest, of_length_us = [], [], [], []
        for tokens in map(int, by_rows):
            prompts = -(-tokens // longest)  # as long as those that were measured
            parts = self._prefill_parts(model, of, Batch(prompts, round(tokens / prompts), 1))
            dense.append(_log_ratio(parts[LAYERS], parts.get(SHARING)))
            rest.append(_log_ratio(parts[REST]))
            one = parts if prompts == 1 else self._prefill_parts(model, of, Batch(1, tokens, 1))
            attention.append(_log_ratio(one[ATTENTION]))
            of_length_us.append(1e6 * one[ATTENTION][0])
        return StepFactors(
            decode=LogGrid(axes, np.asarray(decode)),
            dense=LogGrid((by_rows,), np.asarray(dense)),
            attention=LogGrid((by_rows,), np.asarray(attention)),
            rest=LogGrid((by_rows,), np.asarray(rest)),
            of_length_us=np.asarray(of_length_us),
            sequences=sequences,
            contexts=contexts,
            rows=rows,
        )

    def _prefill_parts(
        self, model: ModelSpec, configuration: ParallelConfig, batch: Batch
    ) -> dict[str, tuple[float, float]]:
        """Return the parts of the time to the first token of a batch: as computed, and corrected."""
        computed = self._parts.time(model, configuration, batch, _FIRST)
        found: dict[str, tuple[float, float]] = {}
        for term, value in zip(computed.terms, self._time_blend.corrected_terms(computed), strict=True):
            before = found.get(term.part, (0.0, 0.0))
            found[term.part] = (before[0] + term.value, before[1] + value)
        return found

    @property
    def admission_s(self) -> float:
        """What passes from the arrival of a request until it is in the engine's queue, as measured."""
        return self._profile.admission_s

    def _memory(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int
    ) -> Corrected:
        check_estimable(self, model, configuration)
        batch = Batch(configuration.batch_size, prompt_tokens, output_tokens)
        return self._memory_blend.corrected(self._parts.memory(model, configuration, batch))

    def _correction(
        self, phase: int, model: ModelSpec, configuration: ParallelConfig, batch: int, tokens: int
    ) -> Corrected:
        """Return the factor of a time, for sequences of so many tokens; nearly equal lengths share it."""
        key = (phase, model, configuration, batch, self._nearby(phase, tokens))
        if key not in self._factors:
            computed = self._parts.time(model, configuration, Batch(batch, key[-1], 1), phase)
            corrected = self._time_blend.corrected(computed)
            self._factors[key] = corrected._replace(value=corrected.value / computed.total)
        return self._factors[key]

    def _nearby(self, phase: int, tokens: int) -> int:
        """Return a length that stands for one: that itself where it was measured."""
        if tokens in self._measured_tokens[phase]:
            return tokens
        return max(1, round(math.exp(round(math.log(tokens) / _LENGTH_STEPS) * _LENGTH_STEPS)))

    @cached_property
    def _measured_tokens(self) -> tuple[frozenset[int], frozenset[int]]:
        """The lengths of prompts that were measured, and of sequences that decoded, half of their output included."""
        batches = [observed.batch for observed in self._profile.observed]
        return (
            frozenset(batch.prompt_tokens for batch in batches),
            frozenset(batch.prompt_tokens + batch.output_tokens // 2 for batch in batches),
        )

    @cached_property
    def _time_blend(self) -> Blend:
        measured = []
        for seen in self._profile.observed:
            if self._parts.why_not(seen.model, seen.configuration) is not None:
                continue  # as of a format that another engine has, and this one lacks
            first, token = self._parts.times(seen.model, seen.configuration, seen.batch)
            more = _SHORT_STAGES_NOISE if 1 < seen.configuration.pp > seen.model.layers / _SHORT_STAGE else 0.0
            measured.append(Measured(first, seen.first_token_s, math.hypot(seen.first_token_noise, more)))
            if seen.batch.output_tokens > 1:
                measured.append(Measured(token, seen.tpot_s, math.hypot(seen.tpot_noise, more)))
        return Blend(measured, TIME_SCALES)

    @cached_property
    def _memory_blend(self) -> Blend:
        return Blend(
            [
                Measured(
                    self._parts.memory(seen.model, seen.configuration, seen.memory_batch or seen.batch),
                    seen.memory_bytes,
                    _MEMORY_NOISE,
                )
                for seen in self._profile.observed
                if seen.memory_bytes and self._parts.why_not(seen.model, seen.configuration) is None
            ],
            MEMORY_SCALES,
            _MEMORY_DEVIATION,
        )


_MEMORY_NOISE = _MEMORY_DEVIATION = 0.005


def _together(first: Corrected, first_s: float, token: Corrected, rest_s: float) -> Interval:
    """Return the interval of a time of two parts, which are taken as if they erred together."""
    deviation = (first_s * first.deviation + rest_s * token.deviation) / (first_s + rest_s)
    return Corrected(1.0, deviation).interval


def _log_ratio(*parts: tuple[float, float] | None) -> float:
    """Return the logarithm of what some parts are together when corrected, over what is computed."""
    computed, corrected = (sum(part[index] for part in parts if part) for index in (0, 1))
    return math.log(corrected / computed)


def _axis(usual: tuple[int, ...], measured: tuple[int, ...]) -> Array:
    return np.asarray(sorted({*usual, *measured}), dtype=np.float64)
