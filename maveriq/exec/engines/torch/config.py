"""Model and parallel configurations of the torch engine, without torch and transformers.

`read_model_config` reads a Hugging Face `config.json`: that of llama, falcon or GPT-J into the switches of maveriq's
own decoder (`read_decoder_config`), that of another family into the sizes of a model that transformers builds.
`check_split` rejects parallel configurations that the engine does not support. `shard_of` returns the part of the model
that a rank holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from maveriq.compat import StrEnum
from maveriq.domain.config_fields import Fields, rope_parameters, rope_type_of
from maveriq.domain.decoder_config import family_name, read_decoder
from maveriq.domain.decoder_families import FAMILIES
from maveriq.domain.model_config import Shape, parse_config, read_shape, shape_of_decoder
from maveriq.domain.model_features import TEXT_PARTS
from maveriq.domain.models import KvType, WeightType
from maveriq.domain.parallel import check_layer_split, why_tp_does_not_divide
from maveriq.domain.quantization_config import read_quantization
from maveriq.errors import InputError
from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.torch.families import EXPANDS_KV_HEADS, TRANSFORMERS_FAMILIES, has_plan
from maveriq.exec.messages import EngineSpec

_WHERE = "config.json"
_SHARED_KEYS = ("dtype", "torch_dtype", "tie_word_embeddings")
"""Keys that a multimodal configuration may have outside of the part for its decoder."""
_MAX_MATRIX_ELEMENTS = 2**50
"""Larger matrices overflow the arithmetic of sizes before an allocation fails."""


class Family(StrEnum):
    """A `model_type` that this engine supports."""

    LLAMA = "llama"
    FALCON = "falcon"
    GPTJ = "gptj"


class Activation(StrEnum):
    """The activation function of a feed-forward block."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Rotary position embedding.

    Attributes:
        size: how many numbers of a head are rotated, from the first.
        theta: the base of the frequencies.
        interleaved: pairs are adjacent numbers; else they are `size` / 2 apart.
        position_scale: divides positions ("linear" scaling).
        frequency_scaling: empty, or llama 3.1's factor, low and high frequency factor, original context length.
    """

    size: int
    theta: float = 10000.0
    interleaved: bool = False
    position_scale: float = 1.0
    frequency_scaling: tuple[float, float, float, float] | tuple[()] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder's sizes and switches.

    With `parallel_attention` attention and the feed-forward block read the same hidden states and their outputs are
    added. `feed_forward_norm` says whether the feed-forward block has a norm of its own. `initializer_range` is the
    standard deviation of random weights.
    """

    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    rotary: Rotary
    activation: Activation
    norm_epsilon: float
    root_mean_square_norm: bool = False
    gated: bool = False
    parallel_attention: bool = False
    feed_forward_norm: bool = False
    attention_bias: bool = False
    feed_forward_bias: bool = False
    output_bias: bool = False
    tie_word_embeddings: bool = False
    bfloat16: bool = False
    initializer_range: float = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersConfig:
    """The sizes of a model that transformers builds, and the `config.json` that it builds it from.

    With `parallel_attention` attention and the feed-forward block read the same hidden states and their outputs are
    added. `family` is the name that maveriq knows, `model_type` that of transformers. `context_tokens` is how many
    positions there are, None if the file does not say.
    """

    family: str
    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    context_tokens: int | None
    bfloat16: bool
    initializer_range: float
    parallel_attention: bool
    config: Mapping[str, Any]


ModelConfig: TypeAlias = DecoderConfig | TransformersConfig


def raise_unsupported(reason: str) -> NoReturn:
    """Raise an `EngineError` of kind `unsupported`."""
    raise EngineError(FailureKind.UNSUPPORTED, reason)


def read_decoder_config(config_json: str) -> DecoderConfig:
    """Read a `config.json`. Its shape is read as everywhere in maveriq, its switches here.

    Raises:
        NotCoveredError: its decoder has a part that maveriq's own has not.
        EngineError: it is not a `config.json`, or its model is not supported.
    """
    try:
        config = parse_config(config_json, _WHERE)
        reader = _READERS.get(family_name(config, _WHERE))
        if reader is None:
            raise_unsupported(f"model_type {config.get('model_type')!r} is not one of {', '.join(_READERS)}")
        shape, quantization = read_shape(config, _WHERE), read_quantization(config, _WHERE).name
    except InputError as error:
        raise_unsupported(str(error))
    _refuse_quantized(quantization)
    arch = reader(config, shape)
    if arch.rotary.size > arch.head_size or arch.rotary.size % 2:
        raise_unsupported(f"rotary size {arch.rotary.size} must be even and at most the head size {arch.head_size}")
    _refuse_huge(shape)
    return arch


class NotCoveredError(EngineError):
    """maveriq's own decoder does not compute what a `config.json` asks for; transformers may."""

    def __init__(self, reason: str) -> None:
        super().__init__(FailureKind.UNSUPPORTED, reason)


def read_model_config(config_json: str) -> ModelConfig:
    """Read a `config.json`, of maveriq's own decoder or of a family that runs on transformers' modules.

    Raises:
        EngineError: it is not a `config.json`, or its model is not supported.
    """
    try:
        config = parse_config(config_json, _WHERE)
        family = family_name(config, _WHERE)
    except InputError as error:
        raise_unsupported(str(error))
    if family not in _READERS and family not in TRANSFORMERS_FAMILIES:
        runs = ", ".join((*_READERS, *TRANSFORMERS_FAMILIES))
        raise_unsupported(f"model_type {config.get('model_type')!r} is not one of {runs}")
    if family not in _READERS:
        return read_transformers_config(config_json)
    try:
        return read_decoder_config(config_json)
    except NotCoveredError:
        read = read_transformers_config(config_json)
        if family in EXPANDS_KV_HEADS and read.kv_heads not in (1, read.heads):
            raise
        return read


def read_transformers_config(config_json: str) -> TransformersConfig:
    """Read the sizes of a model that transformers builds.

    Raises:
        EngineError: it is not a `config.json`, or this engine does not run its model.
    """
    try:
        config = parse_config(config_json, _WHERE)
        family = family_name(config, _WHERE)
        decoder, quantization = read_decoder(config, _WHERE).decoder, read_quantization(config, _WHERE).name
    except InputError as error:
        raise_unsupported(str(error))
    _refuse_quantized(quantization)
    shape = shape_of_decoder(decoder)
    _refuse_huge(shape)
    text = _text_of(config, family)
    sizes = _sizes(text, shape)
    del sizes["head_size"]
    return TransformersConfig(
        family=family,
        model_type=str(text["model_type"]),
        context_tokens=shape.context_tokens,
        parallel_attention=shape.all_reduces_per_layer == 1,
        config=text,
        **sizes,
    )


def _text_of(config: Mapping[str, Any], family: str) -> Mapping[str, Any]:
    """Return the configuration of the decoder alone, also of a multimodal model, of which nothing else runs."""
    part = next((key for key in TEXT_PARTS if config.get(key)), None)
    if part is None:
        return config
    text = {"model_type": family, **{key: config[key] for key in _SHARED_KEYS if key in config}, **config[part]}
    if text["model_type"] not in (family, f"{family}_text"):
        raise_unsupported(
            f"{part} is of model_type {text['model_type']!r}, which this engine does not run within {family}"
        )
    return text


def _refuse_quantized(quantization: str) -> None:
    if quantization:
        raise_unsupported(f"quantization_config: its weights are {quantization} already; the torch engine reads "
                          "weights that are not quantised")  # fmt: skip


def _refuse_huge(shape: Shape) -> None:
    if shape.attention_heads * shape.head_size * shape.hidden_size > _MAX_MATRIX_ELEMENTS:
        raise_unsupported(
            f"config.json: no machine holds a matrix of {shape.attention_heads} heads of {shape.head_size} by "
            f"{shape.hidden_size}"
        )


def _sizes(config: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """Return the fields that all families have in common. `dtype` is the newer name of `torch_dtype`."""
    return {
        "layers": shape.layers,
        "hidden": shape.hidden_size,
        "heads": shape.attention_heads,
        "kv_heads": shape.kv_heads,
        "head_size": shape.head_size,
        "intermediate": shape.intermediate_size,
        "vocabulary": shape.vocab_size,
        "bfloat16": "bfloat16" in (config.get("dtype"), config.get("torch_dtype")),
        "initializer_range": _number(config, "initializer_range", 0.02),
    }


def _llama(config: Mapping[str, Any], shape: Shape) -> DecoderConfig:
    return DecoderConfig(
        family=Family.LLAMA,
        rotary=_rotary(config, shape.head_size),
        activation=_activation(config.get("hidden_act", "silu")),
        norm_epsilon=_number(config, "rms_norm_eps", 1e-6),
        root_mean_square_norm=True,
        gated=True,
        feed_forward_norm=True,
        attention_bias=bool(config.get("attention_bias")),
        feed_forward_bias=bool(config.get("mlp_bias")),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        **_sizes(config, shape),
    )


def _falcon(config: Mapping[str, Any], shape: Shape) -> DecoderConfig:
    if config.get("alibi"):
        raise NotCoveredError("falcon with alibi positions is not supported, only with rotary ones")
    variant = FAMILIES["falcon"].variant
    new = variant is not None and variant.is_chosen(Fields(config, "config.json"))
    parallel = shape.all_reduces_per_layer == 1
    return DecoderConfig(
        family=Family.FALCON,
        rotary=_rotary(config, shape.head_size),
        activation=_activation(config.get("activation", "gelu")),
        norm_epsilon=_number(config, "layer_norm_epsilon", 1e-5),
        parallel_attention=parallel,
        feed_forward_norm=not parallel or (new and config.get("num_ln_in_parallel_attn") in (None, 2)),
        attention_bias=bool(config.get("bias")),
        feed_forward_bias=bool(config.get("bias")),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
        **_sizes(config, shape),
    )


def _gptj(config: Mapping[str, Any], shape: Shape) -> DecoderConfig:
    return DecoderConfig(
        family=Family.GPTJ,
        rotary=Rotary(size=_count(config, "rotary_dim", 64), interleaved=True),
        activation=_activation(config.get("activation_function", "gelu_new")),
        norm_epsilon=_number(config, "layer_norm_epsilon", 1e-5),
        parallel_attention=True,
        feed_forward_bias=True,
        output_bias=True,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        **_sizes(config, shape),
    )


_READERS: Mapping[str, Callable[[Mapping[str, Any], Shape], DecoderConfig]] = {
    Family.LLAMA: _llama,
    Family.FALCON: _falcon,
    Family.GPTJ: _gptj,
}

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
}


def _activation(name: object) -> Activation:
    found = _ACTIVATIONS.get(str(name))
    if found is None:
        raise NotCoveredError(f"activation {name!r} is not one of {', '.join(_ACTIVATIONS)}")
    return found


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise_unsupported(f"config.json: {key} must be a positive whole number, not {value!r}")
    return value


def _number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise_unsupported(f"config.json: {key} must be a positive number, not {value!r}")
    return float(value)


def _rotary(config: Mapping[str, Any], head_size: int) -> Rotary:
    parameters = rope_parameters(config, "config.json")
    for part in (config, parameters):
        if part.get("partial_rotary_factor") not in (None, 1):
            raise NotCoveredError(f"partial_rotary_factor {part['partial_rotary_factor']!r} is not supported, only 1")
    theta = _number(parameters, "rope_theta", _number(config, "rope_theta", 10000.0))
    kind = rope_type_of(parameters, "config.json")
    if kind == "default":
        return Rotary(size=head_size, theta=theta)
    if kind == "linear":
        return Rotary(size=head_size, theta=theta, position_scale=_number(parameters, "factor"))
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        factor, low, high, context = (_number(parameters, key) for key in keys)
        return Rotary(size=head_size, theta=theta, frequency_scaling=(factor, low, high, context))
    raise NotCoveredError(f"rotary positions of type {kind!r} are not supported, only default, linear and llama3")


_WEIGHTS = (WeightType.FLOAT16, WeightType.INT8, WeightType.INT4)
_KV = (KvType.INT8, KvType.NATIVE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The part of a model that one rank holds: its stage's layers, and 1 / tp of their heads and feed-forward width.

    Ranks are numbered stage by stage: rank = stage * tp + tp_rank.
    """

    tp: int
    pp: int
    stage: int
    tp_rank: int
    layers: range

    @property
    def is_first_stage(self) -> bool:
        """Whether this stage holds the embedding."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this stage holds the output matrix."""
        return self.stage == self.pp - 1

    def partition(self, count: int) -> range:
        """Return this rank's indices of `count` items; uneven where tp does not divide `count`."""
        return self.partition_of(self.tp_rank, count)

    def partition_of(self, tp_rank: int, count: int) -> range:
        """Return the indices of `count` items that a rank of this stage holds."""
        return range(count * tp_rank // self.tp, count * (tp_rank + 1) // self.tp)

    def partition_kv_heads(self, kv_heads: int) -> range:
        """Return this rank's KV heads; with fewer KV heads than ranks, several ranks hold the same one."""
        if kv_heads >= self.tp:
            return self.partition(kv_heads)
        head = self.tp_rank * kv_heads // self.tp
        return range(head, head + 1)


def shard_of(spec: EngineSpec, rank: int) -> Shard:
    """Return the shard of a rank; `check_split` must have passed."""
    stage, tp_rank = divmod(rank, spec.tp)
    start = sum(spec.layer_split[:stage])
    return Shard(
        tp=spec.tp, pp=spec.pp, stage=stage, tp_rank=tp_rank, layers=range(start, start + spec.layer_split[stage])
    )


def check_split(spec: EngineSpec, arch: ModelConfig) -> None:
    """Reject a parallel configuration that this engine does not support.

    Raises:
        EngineError: with the reason, and the nearest supported configuration where there is one.
    """
    _check_types(spec)
    _check_split(spec, arch)
    _check_degree(spec.tp, arch)


def _check_types(spec: EngineSpec) -> None:
    if spec.weights == WeightType.INT4_GPTQ:
        raise_unsupported(
            "int4_gptq needs weights that GPTQ has calibrated; the torch engine rounds to nearest: ask for int4"
        )
    if spec.weights not in _WEIGHTS:
        raise_unsupported(f"weights {spec.weights!r} are not one of {', '.join(_WEIGHTS)}")
    if spec.kv not in _KV:
        raise_unsupported(f"KV cache {spec.kv!r} is not one of {', '.join(_KV)}")


def _check_split(spec: EngineSpec, arch: ModelConfig) -> None:
    ranks = spec.tp * spec.pp
    if len(spec.devices) != ranks:
        raise_unsupported(f"TP {spec.tp} x PP {spec.pp} needs {ranks} devices, got {len(spec.devices)}")
    try:
        check_layer_split(spec.layer_split, spec.pp, arch.layers)
    except InputError as error:
        raise_unsupported(str(error))
    if len({device.partition(":")[0] for device in spec.devices}) > 1:
        raise_unsupported(f"devices {', '.join(spec.devices)} are of more than one kind")
    for device in spec.devices:
        kind, _, number = device.partition(":")
        if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
            raise_unsupported(f"device {device!r} is neither cpu nor cuda:N")


def _check_degree(tp: int, arch: ModelConfig) -> None:
    if tp > 1 and isinstance(arch, TransformersConfig) and not has_plan(arch.family):
        raise_unsupported(
            f"transformers has no tensor-parallel plan for {arch.family}; the nearest that it runs is TP 1"
        )

    def reason_against(degree: int) -> str | None:
        return why_tp_does_not_divide(degree, heads=arch.heads, feed_forward=arch.intermediate)

    if reason := reason_against(tp):
        fitting = max(degree for degree in range(1, tp) if reason_against(degree) is None)
        raise_unsupported(f"{reason}; the nearest that does is TP {fitting}")
    if arch.vocabulary < tp:
        raise_unsupported(f"TP {tp} leaves some rank without any of {arch.vocabulary} tokens")
    if reason := why_tp_does_not_divide(tp, kv_heads=arch.kv_heads):
        raise_unsupported(reason)
