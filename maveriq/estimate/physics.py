"""The physics estimator: latency and memory of any decoder on any known kind of GPU, before anything is measured.

It adds up the operators of a model (`maveriq.estimate.step_time`), what an engine's process adds to each step, and the
memory of weights, KV cache and activations. It models an engine that takes one batch at a time (all prompts in one
step, then a token of each sequence a step), or one with continuous batching that always has as many requests in flight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import lru_cache, partial
from itertools import product
from typing import Protocol, TypeAlias

from maveriq.domain.decoder import Decoder, LatentAttention
from maveriq.domain.gpu_kinds import NumberFormat, gpu_sheet, number_format_of
from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.domain.sharding import expert_parallel_degrees, tensor_parallel_divisors, why_not_shared
from maveriq.domain.weight_formats import BITS_16, FORMATS, INT4_BY_CHANNEL, WeightFormat
from maveriq.estimate.engine_memory import (
    EngineSettings,
    predict_kv_blocks,
    reserved_bytes,
    sequence_bytes,
    why_batch_does_not_fit,
)
from maveriq.estimate.engine_presets import DEFAULT_ENGINE, EnginePreset, engine_preset
from maveriq.estimate.estimator import Basis, ServiceEstimate, check_estimable, check_lengths
from maveriq.estimate.hand_over import node_channel
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.estimate.intervals import Interval, family_of, interval_of
from maveriq.estimate.kernel_bounds import BYTES_PER_WEIGHT
from maveriq.estimate.operators import Operators, operators_of
from maveriq.estimate.pipeline_timer import PipelineTimer, StageModel
from maveriq.estimate.steady_state import SteadyLoad, StepTime
from maveriq.estimate.step_time import Chunk, Formats, GriddedSteps, Sharding, StepModel, why_not_timed
from maveriq.estimate.step_timer import StepTimer
from maveriq.units import Bytes

_KV_FORMATS = {
    KvType.NATIVE: NumberFormat.BFLOAT16,
    KvType.FP8: NumberFormat.FP8,
    KvType.INT8: NumberFormat.FP8,  # kernels with an 8-bit cache were measured with floats alone
}

_Stage: TypeAlias = tuple[ModelSpec, int, int, WeightType, KvType]
"""A model, and the degrees and formats that all stages of a pipeline share."""

_OUTPUT_TOKENS = 20  # of a request, where the memory of none in particular is asked for


class StepCorrections(Protocol):
    """Corrects computed step times by measurements (`maveriq.estimate.blended_steps`)."""

    @property
    def engine(self) -> EnginePreset:
        """What the engine's process adds to corrected steps."""

    def corrected(
        self, steps: GriddedSteps, model: ModelSpec, configuration: ParallelConfig, *, layers: int
    ) -> GriddedSteps:
        """Return the times of steps of so many of a model's layers, corrected."""

    def interval(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> Interval:
        """Return the interval of a request's time."""


@dataclass(frozen=True, slots=True)
class PhysicsEstimator:
    """Estimates any decoder on the GPUs of a profile, whatever the profile has measured.

    Args:
        profile: names the kind of GPU, and knows accuracy and configurations that do not run.
        preset: the engine, by generation; None for the one that the profile was measured with, or the default.
        continuous: whether it batches continuously; else it takes one batch after the other, as simulated engines do.
        node_gpus: GPUs of the largest node, which share layers at most; None for the usual number of the kind.
        corrections: of step times, by what was measured; None for none.
    """

    profile: HardwareProfile
    preset: InitVar[EnginePreset | None] = None
    continuous: bool = False
    node_gpus: int | None = None
    corrections: StepCorrections | None = None
    engine: EnginePreset = field(init=False)
    _operators: Operators = field(init=False)
    _models: dict[tuple[ModelSpec, Sharding, Formats, int, int | None], GriddedSteps] = field(default_factory=dict)
    _reasons: dict[_Stage, str | None] = field(default_factory=dict)

    def __post_init__(self, preset: EnginePreset | None) -> None:
        engine = preset or engine_preset(self.profile.engine or DEFAULT_ENGINE)
        own = self.profile.engine_preset(engine) if self.corrections is None else self.corrections.engine
        object.__setattr__(self, "engine", own)
        sheet = self.profile.sheet or gpu_sheet(self.profile.gpu_kind)
        object.__setattr__(self, "_operators", operators_of(sheet, self.engine.kernels))

    @property
    def name(self) -> str:
        """The name by which `--estimator` and `--service-times` know it."""
        return "physics" if self.corrections is None else "blended"

    @property
    def basis(self) -> Basis:
        """What the estimates rest on."""
        return Basis.OPERATORS if self._operators.measured else Basis.DATA_SHEET

    @property
    def pipelines_only_add_time(self) -> bool:
        """Whether a batch takes at least as long in a pipeline: batches that are in flight together do not."""
        return not self.continuous

    def why_not(self, model: ModelSpec, configuration: ParallelConfig) -> str | None:
        """Return why this configuration cannot be estimated or run here, None if it can."""
        key = _stage_of(model, configuration)
        if key not in self._reasons:
            self._reasons[key] = self._why_no_stage(model, configuration)
        if reason := self._reasons[key]:
            return reason
        if configuration.pp > model.layers:
            return f"PP {configuration.pp} leaves a stage without one of the {model.layers} layers"
        return (
            None if self.profile.supports(model.name, configuration) else f"known not to run on {self.profile.gpu_kind}"
        )

    def _why_no_stage(self, model: ModelSpec, configuration: ParallelConfig) -> str | None:
        """Return why no stage can have these formats and degrees, whatever its layers."""
        decoder, most = model.decoder, self.node_gpus or self._operators.gpu.gpus_per_node
        if reason := why_not_timed(decoder) or model.why_not_stored_as(configuration.weights):
            return reason
        if reason := self._why_not_computed(model, configuration):
            return reason
        if configuration.tp > most:
            return f"TP {configuration.tp} spans more than the {most} GPUs of a node"
        stored_as = self._stored_as(model, configuration)
        return why_not_shared(decoder, tp=configuration.tp, ep=configuration.ep, stored_as=stored_as)

    def _why_not_computed(self, model: ModelSpec, configuration: ParallelConfig) -> str | None:
        """Return which format the GPU or its kernels cannot compute with."""
        if reason := self.engine.why_not_stored(configuration.weights, configuration.kv):
            return reason
        latent = any(isinstance(kind.attention, LatentAttention) for kind in model.decoder.layer_kinds)
        if configuration.kv is KvType.INT8 and latent:
            return "no engine caches latent vectors as int8; fp8 takes as many bytes"
        whole = self._stored_as(model, configuration)
        for stored in _formats_of(model.decoder) if whole is None else [whole]:
            number_format = number_format_of(stored)
            if number_format is None:
                return f"step times of {stored.name} weights are not modelled"
            if reason := self._operators.gpu.why_not_computed(number_format):
                return reason
        kv = NumberFormat.FP8 if configuration.kv is KvType.FP8 else NumberFormat.BFLOAT16
        return self._operators.gpu.why_not_computed(kv)

    def configurations(
        self, model: ModelSpec, *, gpus: int, batch_size: int, stages: int | None = None
    ) -> Iterator[ParallelConfig]:
        """Yield the configurations to consider on up to so many GPUs, in the order that breaks ties.

        TP is any divisor of the heads. A checkpoint that is quantised is considered as it is stored, any other in all
        formats. `stages` is how many a pipeline has; None for any number.
        """
        stored = [weights for weights in WeightType if model.why_not_stored_as(weights) is None]
        for tp in tensor_parallel_divisors(model.decoder, gpus):
            most = min(gpus // tp, model.layers)
            for pp in range(1, most + 1) if stages is None else range(stages, min(stages, most) + 1):
                for ep, weights, kv in product(expert_parallel_degrees(model.decoder, tp), stored, _KV_FORMATS):
                    yield ParallelConfig(tp=tp, pp=pp, ep=ep, weights=weights, kv=kv, batch_size=batch_size)

    def service(
        self,
        model: ModelSpec,
        configuration: ParallelConfig,
        *,
        prompt_tokens: int,
        output_tokens: int,
        batch: int,
        max_step_tokens: int | None = None,
    ) -> ServiceEstimate:
        """Estimate one batch of `batch` equal requests that start together on an idle engine.

        With continuous batching, estimate a request among `batch` in flight, in steps of at most `max_step_tokens`;
        None for the engine's default.

        Raises:
            InputError: the configuration has a reason in `why_not`, or fewer than one token or request.
        """
        check_lengths(model, prompt_tokens=prompt_tokens, output_tokens=output_tokens, batch=batch)
        check_estimable(self, model, configuration)
        # The mean context of a decoding sequence is its prompt and half of its output.
        step_us = self._step_time(model, configuration, context_tokens=prompt_tokens + output_tokens / 2)
        if self.continuous:
            load = SteadyLoad(
                in_flight=batch, prompt_tokens=prompt_tokens, output_tokens=output_tokens, stages=configuration.pp,
                max_step_tokens=max_step_tokens or self.settings(configuration).max_num_batched_tokens,
                mixes_prefill=self.engine.mixes_prefill, asynchronous=self.engine.asynchronous,
            )  # fmt: skip
            first_us, token_us = load.times(step_us)
        else:
            first_us, token_us = step_us(0, [Chunk(tokens=prompt_tokens)] * batch), step_us(batch, ())
        first_us += self.engine.first_token_delay_us(prompt_tokens, running=batch)
        lengths = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "batch": batch}
        return ServiceEstimate(
            ttft_s=(first_us - token_us) / 1e6,
            tpot_s=token_us / 1e6,
            output_tokens=output_tokens,
            interval=interval_of(self.engine, family_of(model.decoder), measured=self._operators.measured)
            if self.corrections is None
            else self.corrections.interval(model, configuration, **lengths),
            basis=Basis.MEASURED if self.corrections and self.profile.has_measured(model) else self.basis,
        )

    def _step_time(self, model: ModelSpec, configuration: ParallelConfig, *, context_tokens: float) -> StepTime:
        """Return the time of a step of all stages, whose decoding sequences have so many tokens each."""
        steps = self.step_model(model, configuration)
        channel, hand_overs = node_channel(self._operators.gpu), configuration.pp - 1

        def step_us(decodes: float, chunks: Sequence[Chunk]) -> float:
            gpu_us = steps.gpu_us(decodes=decodes, context_tokens=decodes * context_tokens, chunks=chunks)
            sequences = decodes + len(chunks)
            host_us = self.engine.step_time_us(
                gpu_us, sequences=sequences, layers=model.layers, has_prefill=bool(chunks)
            )
            if not hand_overs:
                return float(host_us)
            tokens = decodes + sum(chunk.tokens for chunk in chunks)
            return float(host_us + hand_overs * channel.hand_over_us(tokens, model.hidden_size))

        return step_us

    def step_timer(self, model: ModelSpec, configuration: ParallelConfig) -> StepTimer:
        """Return what times the steps of an engine of one stage.

        Raises:
            InputError: the configuration has a reason in `why_not`.
        """
        check_estimable(self, model, configuration)
        return StepTimer(self.step_model(model, configuration), self.engine, layers=model.layers)

    def pipeline_timer(self, model: ModelSpec, configuration: ParallelConfig) -> PipelineTimer:
        """Return what times the steps of an engine of several stages, whose GPUs are on one node.

        Raises:
            InputError: the configuration has a reason in `why_not`.
        """
        check_estimable(self, model, configuration)
        channel, size = node_channel(self._operators.gpu), model.hidden_size
        stages, first = [], 0
        split = configuration.layers_per_stage(model.layers)
        for number, layers in enumerate(split, start=1):
            steps = self.step_model(model, configuration, first=first, end=first + layers)
            is_last = number == len(split)
            hand_over_us = _no_hand_over if is_last else partial(channel.hand_over_us, hidden_size=size)
            stages.append(StageModel(steps=steps, layers=layers, hand_over_us=hand_over_us))
            first += layers
        return PipelineTimer(stages, self.engine)

    def kv_blocks(self, model: ModelSpec, configuration: ParallelConfig, settings: EngineSettings) -> int:
        """Return the KV blocks of an engine with these settings; 0 where not even the weights fit."""
        return predict_kv_blocks(
            model.decoder,
            self._operators.gpu,
            tp=configuration.tp,
            pp=configuration.pp,
            stage_layers=max(configuration.layer_split, default=None),
            settings=settings,
            stored_as=self._stored_as(model, configuration),
        )

    def memory(self, model: ModelSpec, configuration: ParallelConfig) -> Bytes:
        """Estimate the memory over all GPUs of a deployment whose requests have the profile's length of prompts.

        Raises:
            InputError: the configuration has a reason in `why_not`.
        """
        return self.memory_with(
            model, configuration, prompt_tokens=self.profile.prompt_tokens, output_tokens=_OUTPUT_TOKENS
        )

    def memory_with(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int
    ) -> Bytes:
        """Estimate the memory as `memory`, with each request of a batch at the given lengths.

        Raises:
            InputError: the configuration has a reason in `why_not`.
        """
        check_estimable(self, model, configuration)
        decoder, tp, batch = model.decoder, configuration.tp, configuration.batch_size
        settings = self.settings(configuration)
        wider = self._operators.gpu.value_bytes / 2
        stored = self._stored_as(model, configuration)
        layers = decoder.layers_bytes(stored) * (wider if stored is BITS_16 else 1.0)
        others = decoder.embedding_bytes() + decoder.head_bytes(stored) + 2 * decoder.other_inputs_parameters
        values = wider if configuration.kv is KvType.NATIVE else 1.0
        cache = values * batch * sequence_bytes(decoder, prompt_tokens + output_tokens, tp=tp, settings=settings)
        largest = min(batch * prompt_tokens, settings.max_num_batched_tokens)
        reserved = reserved_bytes(decoder, tp=tp, pp=configuration.pp, step_tokens=wider * largest, settings=settings)
        return math.ceil(layers + wider * others + cache + configuration.gpus * reserved)

    def why_no_room(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int
    ) -> str | None:
        """Return why a batch of requests of these lengths does not fit the KV cache; None if it does.

        Raises:
            InputError: the configuration has a reason in `why_not`.
        """
        check_estimable(self, model, configuration)
        settings = self.settings(configuration)
        blocks = self.kv_blocks(model, configuration, settings)
        return why_batch_does_not_fit(
            blocks, settings, batch=configuration.batch_size, tokens=prompt_tokens + output_tokens
        )

    def _stored_as(self, model: ModelSpec, configuration: ParallelConfig) -> WeightFormat | None:
        """Return how all matrices of layers are stored; None for a quantised checkpoint, which is loaded as it is."""
        if model.quantization:
            return None
        by_channel = configuration.weights is WeightType.INT4 and self.engine.int4_by_channel
        return INT4_BY_CHANNEL if by_channel else FORMATS[configuration.weights]

    def settings(self, configuration: ParallelConfig) -> EngineSettings:
        """Return the settings that decide about memory, with the cache of a configuration: the engine's defaults.

        Engines that take one batch at a time are started by maveriq, with steps of as many tokens on all GPUs.
        """
        usual = self.engine.settings(
            self._operators.gpu,
            tp=configuration.tp,
            kv_value_bytes=BYTES_PER_WEIGHT[_KV_FORMATS[configuration.kv]],
        )
        own_tokens = EngineSettings().max_num_batched_tokens
        return usual if self.continuous else replace(usual, max_num_batched_tokens=own_tokens)

    def step_model(
        self, model: ModelSpec, configuration: ParallelConfig, *, first: int = 0, end: int | None = None
    ) -> GriddedSteps:
        """Return the step times of layers, by default of all: a pipeline's stages together take as long."""
        stored = self._stored_as(model, configuration)
        sharding = Sharding(tp=configuration.tp, ep=configuration.ep)
        formats = Formats(
            weights=None if stored is None else number_format_of(stored), kv=_KV_FORMATS[configuration.kv]
        )
        end = None if end == model.layers else end
        key = (model, sharding, formats, first, end)
        if key not in self._models:
            steps: GriddedSteps = _step_model(model.decoder, self._operators, sharding, formats, first, end)
            if self.corrections is not None:
                layers = (model.layers if end is None else end) - first
                steps = self.corrections.corrected(steps, model, configuration, layers=layers)
            self._models[key] = steps
        return self._models[key]


@lru_cache(maxsize=512)
def _step_model(
    decoder: Decoder, operators: Operators, sharding: Sharding, formats: Formats, first: int, end: int | None
) -> StepModel:
    """Return a step model, the same for all estimators: its grids take most of the time of a plan."""
    return StepModel(decoder, operators, sharding=sharding, formats=formats, first=first, end=end)


def _no_hand_over(_: int) -> float:
    return 0.0


def _stage_of(model: ModelSpec, configuration: ParallelConfig) -> _Stage:
    return model, configuration.tp, configuration.ep, configuration.weights, configuration.kv


def _formats_of(decoder: Decoder) -> list[WeightFormat]:
    """Return the formats in which a checkpoint stores its matrices."""
    found = [stored for kind in decoder.layer_kinds for _, stored in kind.formats]
    return list(dict.fromkeys([*found, decoder.head_format, BITS_16]))
