"""The physics estimator: latency and memory of any decoder on any known kind of GPU, before anything is measured.

It adds up the operators of a model (`maveriq.estimate.step_time`), what an engine's process adds to each step, and the
memory of weights, KV cache and activations. It models an engine that takes one batch at a time: all prompts in one
step, then a token of each sequence a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import TypeAlias

from maveriq.domain.decoder import DenseFeedForward, ExpertFeedForward, GroupedAttention, LatentAttention, LayerKind
from maveriq.domain.gpu_kinds import NumberFormat, gpu_sheet, number_format_of
from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.domain.sharding import expert_parallel_degrees, tensor_parallel_divisors, why_not_shared
from maveriq.domain.weight_formats import BITS_16, FORMATS, WeightFormat
from maveriq.estimate.engine_presets import DEFAULT_ENGINE, EnginePreset, engine_preset
from maveriq.estimate.estimator import ServiceEstimate, check_estimable, check_lengths
from maveriq.estimate.hand_over import node_channel
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.estimate.operators import BYTES_PER_WEIGHT, Operators, operators_of
from maveriq.estimate.step_time import Chunk, Formats, Sharding, StepModel, why_not_timed
from maveriq.units import BYTES_PER_GIB, Bytes

_KV_FORMATS = {
    KvType.NATIVE: NumberFormat.BFLOAT16,
    KvType.FP8: NumberFormat.FP8,
    KvType.INT8: NumberFormat.FP8,  # kernels with an 8-bit cache were measured with floats alone
}

_Stage: TypeAlias = tuple[ModelSpec, int, int, WeightType, KvType]
"""A model, and the degrees and formats that all stages of a pipeline share."""

_KV_BLOCK_TOKENS = 16
_OUTPUT_TOKENS = 20  # of a request, where the memory of none in particular is asked for
# Memory of an engine on each GPU beside weights, cache and activations, and what communication adds (read off five
# recorded numbers of KV blocks of vLLM on H100).
_ENGINE_GIB, _COMMUNICATION_GIB = 0.2, 0.5

# Margins of 90 % intervals of a latency, by what the estimate rests on. Read off the errors of models that no fit had
# seen; not yet checked on other data.
_MARGIN_MEASURED, _MARGIN_SHEET, _MARGIN_EXPERTS = 0.3, 0.35, 1.0


@dataclass(frozen=True, slots=True)
class PhysicsEstimator:
    """Estimates any decoder on the GPUs of a profile, whatever the profile has measured.

    Args:
        profile: names the kind of GPU, and knows accuracy and configurations that do not run.
        engine: the engine, by generation.
    """

    profile: HardwareProfile
    engine: EnginePreset = field(default_factory=lambda: engine_preset(DEFAULT_ENGINE))
    _operators: Operators = field(init=False)
    _models: dict[_Stage, StepModel] = field(default_factory=dict)
    _reasons: dict[_Stage, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_operators", operators_of(gpu_sheet(self.profile.gpu_kind)))

    @property
    def name(self) -> str:
        """The name by which `--estimator` and `--service-times` know it."""
        return "physics"

    @property
    def rests_on(self) -> str:
        """What the estimates rest on."""
        return "measured operators" if self._operators.measured else "the data sheet"

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
        decoder, most = model.decoder, self._operators.gpu.gpus_per_node
        if reason := why_not_timed(decoder) or model.why_not_stored_as(configuration.weights):
            return reason
        if reason := self._why_not_computed(model, configuration):
            return reason
        if configuration.tp > most:
            return f"TP {configuration.tp} spans more than the {most} GPUs of a node"
        stored_as = _stored_as(model, configuration)
        return why_not_shared(decoder, tp=configuration.tp, ep=configuration.ep, stored_as=stored_as)

    def _why_not_computed(self, model: ModelSpec, configuration: ParallelConfig) -> str | None:
        """Return which format the GPU or its kernels cannot compute with."""
        latent = any(isinstance(kind.attention, LatentAttention) for kind in model.decoder.layer_kinds)
        if configuration.kv is KvType.INT8 and latent:
            return "no engine caches latent vectors as int8; fp8 takes as many bytes"
        for stored in _weight_formats(model, configuration):
            number_format = number_format_of(stored)
            if number_format is None:
                return f"step times of {stored.name} weights are not modelled"
            if reason := self._operators.gpu.why_not_computed(number_format):
                return reason
        kv = NumberFormat.FP8 if configuration.kv is KvType.FP8 else NumberFormat.BFLOAT16
        return self._operators.gpu.why_not_computed(kv)

    def configurations(self, model: ModelSpec, *, gpus: int, batch_size: int) -> Iterator[ParallelConfig]:
        """Yield the configurations to consider on up to so many GPUs, in the order that breaks ties.

        TP is any divisor of the heads. A checkpoint that is quantised is considered as it is stored, any other in all
        formats.
        """
        stored = [weights for weights in WeightType if model.why_not_stored_as(weights) is None]
        for tp in tensor_parallel_divisors(model.decoder, gpus):
            for pp in range(1, min(gpus // tp, model.layers) + 1):
                for ep, weights, kv in product(expert_parallel_degrees(model.decoder, tp), stored, _KV_FORMATS):
                    yield ParallelConfig(tp=tp, pp=pp, ep=ep, weights=weights, kv=kv, batch_size=batch_size)

    def service(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> ServiceEstimate:
        """Estimate one batch of `batch` equal requests that start together on an idle engine.

        Raises:
            InputError: the configuration has a reason in `why_not`, or fewer than one token or request.
        """
        check_lengths(model, prompt_tokens=prompt_tokens, output_tokens=output_tokens, batch=batch)
        check_estimable(self, model, configuration)
        steps = self._step_model(model, configuration)
        chunks = [Chunk(tokens=prompt_tokens)] * batch
        prefill_us = steps.gpu_us(decodes=0, context_tokens=0, chunks=chunks)
        # The mean context of a decoding sequence is its prompt and half of its output.
        context = batch * (prompt_tokens + output_tokens / 2)
        decode_us = steps.gpu_us(decodes=batch, context_tokens=context)
        channel, hand_overs = node_channel(self._operators.gpu), configuration.pp - 1
        step_us = self.engine.step_time_us(decode_us, sequences=batch, has_prefill=False)
        step_us += hand_overs * channel.hand_over_us(batch, model.hidden_size)
        first_us = self.engine.step_time_us(prefill_us, sequences=batch, has_prefill=True)
        first_us += hand_overs * channel.hand_over_us(batch * prompt_tokens, model.hidden_size)
        first_us += self.engine.first_token_delay_us(prompt_tokens)
        return ServiceEstimate(
            ttft_s=(first_us - step_us) / 1e6,
            tpot_s=step_us / 1e6,
            output_tokens=output_tokens,
            margin=self._margin(model),
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
        weights = decoder.weight_bytes(_stored_as(model, configuration))
        weights += 2 * decoder.other_inputs_parameters
        tokens = _KV_BLOCK_TOKENS * math.ceil((prompt_tokens + output_tokens) / _KV_BLOCK_TOKENS)
        value_bytes = BYTES_PER_WEIGHT[_KV_FORMATS[configuration.kv]]
        cache = batch * decoder.kv_cache(value_bytes).sequence_bytes(tokens) * _cache_copies(model, tp)
        widest = max(_activation_values(kind, tp) for kind in decoder.layer_kinds) + 2 * decoder.hidden_size
        activations = 4.0 * batch * prompt_tokens * widest * configuration.gpus
        engine_gib = configuration.gpus * (_ENGINE_GIB + (_COMMUNICATION_GIB if configuration.gpus > 1 else 0.0))
        return math.ceil(weights + cache + activations + engine_gib * BYTES_PER_GIB)

    def _step_model(self, model: ModelSpec, configuration: ParallelConfig) -> StepModel:
        """Return the step model of all layers: a pipeline's stages together take as long."""
        key = _stage_of(model, configuration)
        found = self._models.get(key)
        if found is None:
            stored = _stored_as(model, configuration)
            found = self._models[key] = StepModel(
                model.decoder,
                self._operators,
                sharding=Sharding(tp=configuration.tp, ep=configuration.ep),
                formats=Formats(
                    weights=None if stored is None else number_format_of(stored), kv=_KV_FORMATS[configuration.kv]
                ),
            )
        return found

    def _margin(self, model: ModelSpec) -> float:
        kinds = model.decoder.layer_kinds
        if any(isinstance(kind.feed_forward, ExpertFeedForward) for kind in kinds):
            return _MARGIN_EXPERTS
        return _MARGIN_MEASURED if self._operators.measured else _MARGIN_SHEET


def _stage_of(model: ModelSpec, configuration: ParallelConfig) -> _Stage:
    return model, configuration.tp, configuration.ep, configuration.weights, configuration.kv


def _stored_as(model: ModelSpec, configuration: ParallelConfig) -> WeightFormat | None:
    """Return how all matrices of layers are stored; None for a quantised checkpoint, which is loaded as it is."""
    return None if model.quantization else FORMATS[configuration.weights]


def _weight_formats(model: ModelSpec, configuration: ParallelConfig) -> list[WeightFormat]:
    stored = _stored_as(model, configuration)
    if stored is not None:
        return [stored]
    decoder = model.decoder
    found = [stored for kind in decoder.layer_kinds for _, stored in kind.formats]
    return list(dict.fromkeys([*found, decoder.head_format, BITS_16]))


def _cache_copies(model: ModelSpec, tp: int) -> int:
    """Return how often the GPUs of a stage keep a token: KV heads are dealt out, latent vectors are not."""
    copies = 1
    for kind in model.decoder.layer_kinds:
        if isinstance(kind.attention, LatentAttention):
            copies = max(copies, tp)
        elif isinstance(kind.attention, GroupedAttention):
            copies = max(copies, tp // kind.attention.kv_heads)
    return copies


def _activation_values(kind: LayerKind, tp: int) -> float:
    """Return the values of a token that one GPU keeps within a layer."""
    values = 0.0
    if isinstance(kind.attention, GroupedAttention):
        values += (kind.attention.heads + 2 * kind.attention.kv_heads) * kind.attention.head_size / tp
    elif isinstance(kind.attention, LatentAttention):
        values += 3 * kind.attention.heads * (kind.attention.nope_size + kind.attention.rope_size) / tp
    if isinstance(kind.feed_forward, DenseFeedForward):
        values += 3 * kind.feed_forward.width / tp
    elif isinstance(kind.feed_forward, ExpertFeedForward):
        part = kind.feed_forward
        values += 3 * (part.experts_per_token * part.width + part.shared_width) / tp
    return values
