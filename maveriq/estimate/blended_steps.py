"""The step times of continuous engines, corrected by what a profile measured.

A profile measures three kinds of steps: that of all prompts of a batch, those that decode, and those that hold a prompt
beside decoding sequences. `BlendedEstimator` knows by which factors the parts of such steps differ from the computed
ones. Here they are put on the grids of the computed steps, so that simulators, also compiled ones, answer from them.

A step that holds chunks beside decoding sequences takes what one with chunks alone takes for as many tokens, what the
sequences attend to, and a surcharge, which measured steps of this kind tell. What the engine's process adds is part of
what was measured, and no longer added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import NamedTuple

import msgspec
import numpy as np

from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.blended import BlendedEstimator, StepFactors
from maveriq.estimate.engine_presets import SHARPNESS, EnginePreset, engine_preset
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.estimate.intervals import Interval
from maveriq.estimate.log_grid import Array
from maveriq.estimate.observations import Observation
from maveriq.estimate.physics import PhysicsEstimator
from maveriq.estimate.step_grids import StepGrids
from maveriq.estimate.step_time import GriddedSteps

_MOST_CONTEXTS = 32  # that compiled engines have room for (maveriq.estimate.compiled_timer)
_USUAL_ROWS = 64
_TILE = 16  # rows that tensor cores multiply at once (maveriq.estimate.operators)
_LEAST_SHARE = 1e-3  # of a step, which its dense parts take at least


@dataclass(frozen=True, slots=True)
class BlendedSteps:
    """Corrects computed step times by the measurements of a profile.

    Args:
        estimator: knows the measurements.
        preset: of the engine that was measured.
        in_tiles: whether rows are multiplied 16 at a time, as tensor cores do; a machine without a data sheet has none.
    """

    estimator: BlendedEstimator
    preset: EnginePreset
    in_tiles: bool = True
    _factors: dict[tuple[ModelSpec, ParallelConfig], StepFactors] = field(default_factory=dict)
    _surcharges: dict[ParallelConfig, Surcharge | None] = field(default_factory=dict)

    @property
    def engine(self) -> EnginePreset:
        """The engine of corrected steps: its process adds nothing to them, and its API what was measured."""
        return msgspec.structs.replace(
            self.preset, step_us=0.0, sequence_us=0.0, layer_us=0.0, kernel_factor=1.0, prefill_factor=1.0,
            api_us=1e6 * self.estimator.admission_s, api_token_us=0.0, api_sequence_us=0.0,
        )  # fmt: skip

    def corrected(
        self, steps: GriddedSteps, model: ModelSpec, configuration: ParallelConfig, *, layers: int
    ) -> GriddedSteps:
        """Return step times as measured, with what the engine's process adds.

        Args:
            steps: computed times of the kernels.
            model: the whole model.
            configuration: of the engine.
            layers: that the times are of: those of a pipeline stage, or all.
        """
        surcharge = self._surcharge(replace(configuration.at_any_place(), batch_size=1))
        return self._with_surcharge(steps, model, configuration, layers, surcharge)

    def _with_surcharge(
        self,
        steps: GriddedSteps,
        model: ModelSpec,
        configuration: ParallelConfig,
        layers: int,
        surcharge: Surcharge | None,
    ) -> GriddedSteps:
        key = (model, configuration.at_any_place())
        if key not in self._factors:
            self._factors[key] = self.estimator.step_factors(*key)
        smooth = steps if self.in_tiles else GriddedSteps(_without_tiles(steps.grids))
        correction = _Correction(steps, smooth, self.preset, self._factors[key], layers, model.layers, surcharge)
        return GriddedSteps(correction.grids())

    def _surcharge(self, configuration: ParallelConfig) -> Surcharge | None:
        """Return the surcharge of a configuration, of all where none was measured with it; None without any."""
        if configuration not in self._surcharges:
            seen = self.estimator.mixed_steps
            own = [each for each in seen if each.configuration == configuration]
            self._surcharges[configuration] = self._measured_surcharge(own or seen)
        return self._surcharges[configuration]

    def _measured_surcharge(self, seen: Sequence[Observation]) -> Surcharge | None:
        """Return the surcharge with which measured steps are met best; errors count relative to their time."""
        if not seen:
            return None
        from scipy.optimize import nnls  # late: it is slow to import

        steps: dict[tuple[ModelSpec, ParallelConfig], GriddedSteps] = {}
        rows: list[list[float]] = []
        left: list[float] = []
        for each in seen:
            key = (each.model, each.configuration)
            if key not in steps:
                computed = self.estimator.computed_steps(*key)
                steps[key] = self._with_surcharge(computed, *key, each.model.layers, Surcharge())
            size, prompt, output = each.batch
            context = prompt + output / 2
            attending_us = steps[key].gpu_us(decodes=size, context_tokens=size * context) - steps[key].gpu_us(
                decodes=size, context_tokens=size
            )
            without_us = steps[key].gpu_us(decodes=size, context_tokens=size * context, chunks=[(prompt, 0)])
            measured_us = 1e6 * (each.mixed_s or 0.0)
            terms = (1.0, each.model.layers, size, size * each.model.layers, attending_us)
            rows.append([term / measured_us for term in terms])
            left.append((measured_us - without_us) / measured_us)
        found, _ = nnls(np.asarray(rows), np.asarray(left))
        return Surcharge(*map(float, found))

    def interval(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> Interval:
        """Return the factors of a request's time between which it lies in 90 of 100 cases."""
        lengths = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "batch": batch}
        return self.estimator.service_interval(model, configuration, **lengths)


def measured_engine(profile: HardwareProfile, preset: EnginePreset) -> bool:
    """Return whether a profile measured steps of an engine of this generation."""
    return bool(profile.observed) and engine_preset(profile.engine).name == preset.name


def continuous_estimator(
    profile: HardwareProfile, preset: EnginePreset, *, node_gpus: int | None, blended: bool = True
) -> PhysicsEstimator:
    """Return what estimates an engine that batches continuously, by steps.

    Args:
        profile: of the GPUs.
        preset: the engine, by generation.
        node_gpus: GPUs of the largest node; None for the usual number of the kind.
        blended: whether steps are corrected by what the profile measured of an engine of this generation.
    """
    corrections = None
    if blended and measured_engine(profile, preset):
        measured = profile.engine_preset(preset)
        estimator = BlendedEstimator(profile, PhysicsEstimator(profile, node_gpus=node_gpus))
        corrections = BlendedSteps(estimator, measured, in_tiles=profile.sheet is None)
    return PhysicsEstimator(profile, preset, continuous=True, node_gpus=node_gpus, corrections=corrections)


class Surcharge(NamedTuple):
    """What a step with chunks takes longer because sequences decode beside them, in µs.

    Args:
        step: once.
        layer: for each layer.
        sequence: for each sequence.
        sequence_layer: for each sequence in each layer.
        attention: as a share of what attending to the sequences takes in a step without chunks.
    """

    step: float = 0.0
    layer: float = 0.0
    sequence: float = 0.0
    sequence_layer: float = 0.0
    attention: float = 0.0

    def of(self, sequences: Array, attending_us: Array, *, layers: int, share: float) -> Array:
        """Return the surcharge of so many layers, a share of a model's, for numbers of sequences."""
        once = share * self.step + layers * self.layer
        each = share * self.sequence + layers * self.sequence_layer
        return np.asarray((once + each * sequences)[:, None] + self.attention * attending_us)


@dataclass(frozen=True, slots=True)
class _Correction:
    """Puts factors on grids; arguments as in `BlendedSteps.corrected`, the layers of the whole model, the surcharge.

    `smooth` are the times between sizes that were measured, `steps` those at these.
    """

    steps: GriddedSteps
    smooth: GriddedSteps
    preset: EnginePreset
    factors: StepFactors
    layers: int
    all_layers: int
    surcharge: Surcharge | None

    def grids(self) -> StepGrids:
        """Return the grids of steps that take as long as was measured."""
        grids, factors = self.smooth.grids, self.factors
        tokens = _with(grids.tokens, (*factors.rows, *factors.sequences))
        sequences = _with(grids.sequences, (*factors.sequences, *tokens[tokens <= grids.sequences[-1]]))
        context = _with(grids.context, factors.contexts, most=_MOST_CONTEXTS)
        chunk = _with(grids.chunk, factors.rows)

        fixed_us = self._fixed_us(sequences)
        dense_us = self._dense_us(tokens) * factors.dense.ratio(tokens)
        # The factor of what is fixed differs with the tokens. What it is more than usual counts with the dense parts.
        usual = float(factors.rest.ratio(median(factors.rows or (_USUAL_ROWS,))))
        dense_us += (factors.rest.ratio(tokens) - usual) * fixed_us[0]
        dense_us = np.maximum(dense_us, _LEAST_SHARE * usual * fixed_us[0])
        fixed_us = usual * fixed_us

        decode_us, mixed_us = self._decode_us(sequences, context)
        begun_us = (np.interp(sequences, tokens, dense_us) + fixed_us)[:, None]
        attention = self.preset.prefill_factor * self._attention_ratio(chunk)
        return StepGrids(
            tokens=tokens, tokens_us=dense_us, sequences=sequences, context=context,
            decode_us=decode_us - begun_us, mixed_decode_us=mixed_us, chunk=chunk, past=grids.past,
            prefill_us=attention * _rows(grids.chunk, grids.prefill_us, chunk),
            prefill_lead_us=attention * _rows(grids.chunk, grids.prefill_lead_us, chunk),
            head_us=fixed_us,
        )  # fmt: skip

    def _attention_ratio(self, chunk: Array) -> Array:
        """Return the factor of attention for chunks of a length behind so many tokens: those of the grid."""
        grids, factors = self.steps.grids, self.factors
        alone_us = self.preset.prefill_factor * _rows(grids.chunk, grids.prefill_us + grids.prefill_lead_us, chunk)
        of_length_us = np.interp(chunk, factors.attention.axes[0], factors.of_length_us) * self.layers / self.all_layers
        of_any_us = np.maximum(alone_us[:, 0] - of_length_us, 0.0)[:, None]
        share = of_any_us / np.maximum(alone_us, 1e-9)
        return np.asarray(
            share * factors.dense.ratio(chunk)[:, None] + (1 - share) * factors.attention.ratio(chunk)[:, None]
        )

    def _dense_us(self, tokens: Array) -> Array:
        """Return the computed time of all layers without attention in a step that holds prompts."""
        exact, smooth = (np.interp(tokens, of.grids.tokens, of.grids.tokens_us) for of in (self.steps, self.smooth))
        measured = np.isin(tokens, (*self.factors.rows, *self.factors.sequences))
        dense_us = self.preset.prefill_factor * np.where(measured, exact, smooth)
        launch_us = self.preset.layer_us * self.layers
        if launch_us:
            dense_us = (dense_us**SHARPNESS + launch_us**SHARPNESS) ** (1 / SHARPNESS)
        return np.asarray(dense_us)

    def _fixed_us(self, sequences: Array) -> Array:
        """Return the computed time of the output and of the host, of which a stage has its share."""
        grids = self.steps.grids
        head_us = self.preset.prefill_factor * np.interp(sequences, grids.sequences, grids.head_us)
        return np.asarray(head_us + self.layers / self.all_layers * self.preset.host_us(sequences))

    def _decode_us(self, sequences: Array, context: Array) -> tuple[Array, Array]:
        """Return the whole time of steps that only decode, and what decoding adds to steps that hold chunks."""
        alone, beside = np.zeros((2, len(sequences), len(context)))
        for row, size in enumerate(sequences):
            steps = self.steps if size in self.factors.sequences else self.smooth
            for column, length in enumerate(context):
                kernels_us = steps.gpu_us(decodes=size, context_tokens=size * length)
                alone[row, column] = self.preset.kernels_us(kernels_us, has_prefill=False, layers=self.layers)
                beside[row, column] = self.preset.prefill_factor * self.steps.mixed_decode_us(size, length)
        alone += (self.layers / self.all_layers * self.preset.host_us(sequences))[:, None]
        factor = self.factors.decode.ratio(sequences[:, None], context[None, :])
        if self.surcharge is None:
            return factor * alone, factor * beside
        alone *= factor
        attending_us, share = alone - alone[:, :1], self.layers / self.all_layers
        return alone, attending_us + self.surcharge.of(sequences, attending_us, layers=self.layers, share=share)


def _with(axis: Array, points: Iterable[float], most: int | None = None) -> Array:
    """Return the points of an axis and further ones, of which those are left out that are too many."""
    new = sorted({float(point) for point in points} - set(axis.tolist()))
    if most is not None and len(new) > most - len(axis):
        places = np.linspace(0, len(new) - 1, most - len(axis)).astype(int)
        new = [new[place] for place in dict.fromkeys(places.tolist())]
    return np.asarray(sorted({*axis.tolist(), *new}))


def _without_tiles(grids: StepGrids) -> StepGrids:
    """Return grids without the points at which a further tile begins."""
    tokens, sequences = ((axis < _TILE) | (axis % _TILE == 0) for axis in (grids.tokens, grids.sequences))
    return grids._replace(
        tokens=grids.tokens[tokens],
        tokens_us=grids.tokens_us[tokens],
        sequences=grids.sequences[sequences],
        decode_us=grids.decode_us[sequences],
        mixed_decode_us=grids.mixed_decode_us[sequences],
        head_us=grids.head_us[sequences],
    )


def _rows(axis: Array, table: Array, at: Array) -> Array:
    """Return the rows of a table at other points of its first axis, linear between its own and beyond the last."""
    cell = np.clip(np.searchsorted(axis, at, side="right") - 1, 0, len(axis) - 2)
    share = ((at - axis[cell]) / (axis[cell + 1] - axis[cell]))[:, None]
    return np.asarray((1 - share) * table[cell] + share * table[cell + 1])
