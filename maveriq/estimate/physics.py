"""The physics estimator: latency and memory of any decoder on any known kind of GPU, before anything is measured.

It adds up the operators of a model (`maveriq.estimate.step_time`), what an engine's process adds to each step, and the
memory of weights, KV cache and activations. It models an engine that takes one batch at a time: all prompts in one
step, then a token of each sequence a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from maveriq.domain.decoder import DenseFeedForward, ExpertFeedForward, GroupedAttention, LatentAttention, LayerKind
from maveriq.domain.gpu_kinds import NumberFormat, gpu_sheet
from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.domain.parallel import ParallelConfig, why_tp_does_not_divide
from maveriq.domain.weight_formats import FORMATS
from maveriq.estimate.engine_presets import DEFAULT_ENGINE, EnginePreset, engine_preset
from maveriq.estimate.estimator import ServiceEstimate, check_estimable, check_lengths
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.estimate.operators import BYTES_PER_WEIGHT, Operators, operators_of
from maveriq.estimate.step_time import Chunk, Formats, Sharding, StepModel, stage_models, why_not_timed
from maveriq.units import BYTES_PER_GIB, Bytes

WEIGHT_FORMATS = {
    WeightType.FLOAT16: NumberFormat.BFLOAT16,
    WeightType.INT8: NumberFormat.INT8,
    WeightType.INT4: NumberFormat.INT4,
    WeightType.INT4_GPTQ: NumberFormat.INT4,
    WeightType.FP8: NumberFormat.FP8,
}
"""How weights of a type are computed with; types that are not here are not estimated."""

_HAND_OVER_US = 15.0
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
    _stages: dict[tuple[ModelSpec, ParallelConfig], list[StepModel]] = field(default_factory=dict)

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
        tp, decoder = configuration.tp, model.decoder
        if untimed := why_not_timed(decoder):
            return untimed
        if configuration.weights not in WEIGHT_FORMATS:
            return f"{configuration.weights} weights are not modelled by the physics estimator"
        if configuration.weights is WeightType.FP8 and NumberFormat.FP8 not in self._operators.gpu.tflops:
            return f"{self.profile.gpu_kind} computes no fp8"
        if tp > self._operators.gpu.gpus_per_node:
            return f"TP {tp} spans more than the {self._operators.gpu.gpus_per_node} GPUs of a node"
        if configuration.pp > decoder.layers:
            return f"PP {configuration.pp} leaves a stage without one of the {decoder.layers} layers"
        reasons = (_why_not_shared(kind, tp) for kind in decoder.layer_kinds)
        divides = next((reason for reason in reasons if reason), None)
        if divides or (stored := model.why_not_stored_as(configuration.weights)):
            return divides or stored
        return (
            None if self.profile.supports(model.name, configuration) else f"known not to run on {self.profile.gpu_kind}"
        )

    def service(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> ServiceEstimate:
        """Estimate one batch of `batch` equal requests that start together on an idle engine.

        Raises:
            InputError: the configuration has a reason in `why_not`, or fewer than one token or request.
        """
        check_lengths(model, prompt_tokens=prompt_tokens, output_tokens=output_tokens, batch=batch)
        stages = self._stage_models(model, configuration)
        handed_us = _HAND_OVER_US * (configuration.pp - 1)
        chunks = [Chunk(tokens=prompt_tokens)] * batch
        prefill_us = sum(stage.gpu_us(decodes=0, context_tokens=0, chunks=chunks) for stage in stages)
        # The mean context of a decoding sequence is its prompt and half of its output.
        context = batch * (prompt_tokens + output_tokens / 2)
        decode_us = sum(stage.gpu_us(decodes=batch, context_tokens=context) for stage in stages)
        step_us = self.engine.step_time_us(decode_us, sequences=batch, has_prefill=False) + handed_us
        first_us = self.engine.step_time_us(prefill_us, sequences=batch, has_prefill=True) + handed_us
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
        # A checkpoint that is quantised is loaded as it is stored.
        weights = decoder.weight_bytes(None if model.quantization else FORMATS[configuration.weights])
        weights += 2 * decoder.other_inputs_parameters
        tokens = _KV_BLOCK_TOKENS * math.ceil((prompt_tokens + output_tokens) / _KV_BLOCK_TOKENS)
        value_bytes = BYTES_PER_WEIGHT[_kv_format(configuration)]
        cache = batch * decoder.kv_cache(value_bytes).sequence_bytes(tokens) * _cache_copies(model, tp)
        widest = max(_activation_values(kind, tp) for kind in decoder.layer_kinds) + 2 * decoder.hidden_size
        activations = 4.0 * batch * prompt_tokens * widest * configuration.gpus
        engine_gib = configuration.gpus * (_ENGINE_GIB + (_COMMUNICATION_GIB if configuration.gpus > 1 else 0.0))
        return math.ceil(weights + cache + activations + engine_gib * BYTES_PER_GIB)

    def _stage_models(self, model: ModelSpec, configuration: ParallelConfig) -> list[StepModel]:
        key = (model, configuration)
        found = self._stages.get(key)
        if found is None:
            check_estimable(self, model, configuration)
            number_format = WEIGHT_FORMATS[configuration.weights]
            found = self._stages[key] = stage_models(
                model.decoder,
                self._operators,
                configuration.layers_per_stage(model.decoder.layers),
                sharding=Sharding(tp=configuration.tp),
                formats=Formats(dense=number_format, experts=number_format, kv=_kv_format(configuration)),
            )
        return found

    def _margin(self, model: ModelSpec) -> float:
        kinds = model.decoder.layer_kinds
        if any(isinstance(kind.feed_forward, ExpertFeedForward) for kind in kinds):
            return _MARGIN_EXPERTS
        return _MARGIN_MEASURED if self._operators.measured else _MARGIN_SHEET


def _kv_format(configuration: ParallelConfig) -> NumberFormat:
    # Kernels with an 8-bit cache were measured with floats alone.
    return NumberFormat.FP8 if configuration.kv is KvType.INT8 else NumberFormat.BFLOAT16


def _why_not_shared(kind: LayerKind, tp: int) -> str | None:
    """Return which part of a layer `tp` GPUs cannot share, None where they can share all."""
    heads = kv_heads = width = None
    if isinstance(kind.attention, GroupedAttention):
        heads, kv_heads = kind.attention.heads, kind.attention.kv_heads
    elif isinstance(kind.attention, LatentAttention):
        heads = kind.attention.heads
    if isinstance(kind.feed_forward, DenseFeedForward | ExpertFeedForward):
        width = kind.feed_forward.width
    return why_tp_does_not_divide(tp, heads=heads, kv_heads=kv_heads, feed_forward=width)


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
