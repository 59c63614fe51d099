"""What a Hugging Face `config.json` says: llama, falcon and GPT-J are one decoder with different switches.

Which part of a model a rank holds, and what cannot be split so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NoReturn

from maveriq.domain.models import KvType, WeightType
from maveriq.domain.parallel import check_layer_split, why_tp_does_not_divide
from maveriq.errors import InputError
from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.messages import EngineSpec

_MAX_NUMBERS = 2**50
"""Of a matrix; more would not be missed as memory, but break the arithmetic of sizes."""


class Family(StrEnum):
    """A `model_type` that this engine runs."""

    LLAMA = "llama"
    FALCON = "falcon"
    GPTJ = "gptj"


class Activation(StrEnum):
    """The function between the matrices of a feed-forward part."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """How positions turn queries and keys.

    The first `size` numbers of a head are turned; pairs are neighbours where `interleaved`, else they lie
    half of `size` apart. `frequency_scaling` is empty, or llama 3.1's: factor, low and high
    frequency factor, original context length. `stretch` divides positions ("linear" scaling).
    """

    size: int
    theta: float = 10000.0
    interleaved: bool = False
    stretch: float = 1.0
    frequency_scaling: tuple[float, float, float, float] | tuple[()] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder's sizes and switches.

    `parallel` puts the feed-forward part beside attention instead of after it; `feed_forward_norm` gives it a norm of
    its own. `tied` takes the embedding for the output matrix. `spread` is the standard deviation of
    random weights.
    """

    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    rotary: Rotary
    activation: Activation
    norm_epsilon: float
    root_mean_square_norm: bool = False
    gated: bool = False
    parallel: bool = False
    feed_forward_norm: bool = False
    attention_bias: bool = False
    feed_forward_bias: bool = False
    output_bias: bool = False
    tied: bool = False
    bfloat16: bool = False
    spread: float = 0.02

    @property
    def head_size(self) -> int:
        """Numbers of a head."""
        return self.hidden // self.heads


def refuse(reason: str) -> NoReturn:
    """Raise that something is not supported."""
    raise EngineError(FailureKind.UNSUPPORTED, reason)


def read_decoder_config(config_json: str) -> DecoderConfig:
    """Read a `config.json`.

    Raises:
        EngineError: it is none, or of a decoder that this engine does not run.
    """
    try:
        config = json.loads(config_json)
    except (ValueError, RecursionError) as error:
        refuse(f"config.json is not JSON: {error}")
    if not isinstance(config, dict):
        refuse("config.json must hold an object")
    reader = _READERS.get(str(config.get("model_type")))
    if reader is None:
        refuse(f"model_type {config.get('model_type')!r} is not one of {', '.join(_READERS)}")
    arch = reader(config)
    if arch.hidden % arch.heads or arch.heads % arch.kv_heads:
        refuse(f"{arch.heads} heads must divide hidden size {arch.hidden} and be divided by {arch.kv_heads} KV heads")
    if arch.rotary.size > arch.head_size or arch.rotary.size % 2:
        refuse(f"rotary size {arch.rotary.size} must be even and at most the head size {arch.head_size}")
    if max(arch.vocabulary, arch.intermediate) * arch.hidden > _MAX_NUMBERS:
        refuse(f"config.json: no machine holds matrices of {arch.vocabulary} or {arch.intermediate} by {arch.hidden}")
    return arch


def _llama(config: Mapping[str, Any]) -> DecoderConfig:
    heads, hidden = _count(config, "num_attention_heads"), _count(config, "hidden_size")
    head_size = _count(config, "head_dim", max(1, hidden // heads))
    if head_size * heads != hidden:
        refuse(f"{heads} heads of size (head_dim) {head_size} must make up the hidden size {hidden}")
    return DecoderConfig(
        family=Family.LLAMA,
        layers=_count(config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=_count(config, "num_key_value_heads", heads),
        intermediate=_count(config, "intermediate_size"),
        vocabulary=_count(config, "vocab_size"),
        rotary=_rotary(config, head_size),
        activation=_activation(config.get("hidden_act", "silu")),
        norm_epsilon=_number(config, "rms_norm_eps", 1e-6),
        root_mean_square_norm=True,
        gated=True,
        feed_forward_norm=True,
        attention_bias=bool(config.get("attention_bias")),
        feed_forward_bias=bool(config.get("mlp_bias")),
        tied=bool(config.get("tie_word_embeddings", False)),
        **_types(config),
    )


def _falcon(config: Mapping[str, Any]) -> DecoderConfig:
    if config.get("alibi"):
        refuse("falcon with alibi positions is not run, only with rotary ones")
    heads, hidden = _count(config, "num_attention_heads"), _count(config, "hidden_size")
    new = bool(config.get("new_decoder_architecture"))
    parallel = new or bool(config.get("parallel_attn", True))
    kv_heads = heads
    if new:
        kv_heads = _count(config, "num_kv_heads", heads)
    elif config.get("multi_query", True):
        kv_heads = 1
    return DecoderConfig(
        family=Family.FALCON,
        layers=_count(config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        intermediate=_count(config, "ffn_hidden_size", 4 * hidden),
        vocabulary=_count(config, "vocab_size"),
        rotary=_rotary(config, hidden // heads),
        activation=_activation(config.get("activation", "gelu")),
        norm_epsilon=_number(config, "layer_norm_epsilon", 1e-5),
        parallel=parallel,
        feed_forward_norm=not parallel or (new and config.get("num_ln_in_parallel_attn") in (None, 2)),
        attention_bias=bool(config.get("bias")),
        feed_forward_bias=bool(config.get("bias")),
        tied=bool(config.get("tie_word_embeddings", True)),
        **_types(config),
    )


def _gptj(config: Mapping[str, Any]) -> DecoderConfig:
    hidden = _count(config, "n_embd")
    return DecoderConfig(
        family=Family.GPTJ,
        layers=_count(config, "n_layer"),
        hidden=hidden,
        heads=_count(config, "n_head"),
        kv_heads=_count(config, "n_head"),
        intermediate=_count(config, "n_inner", 4 * hidden),
        vocabulary=_count(config, "vocab_size"),
        rotary=Rotary(size=_count(config, "rotary_dim", 64), interleaved=True),
        activation=_activation(config.get("activation_function", "gelu_new")),
        norm_epsilon=_number(config, "layer_norm_epsilon", 1e-5),
        parallel=True,
        feed_forward_bias=True,
        output_bias=True,
        tied=bool(config.get("tie_word_embeddings", False)),
        **_types(config),
    )


_READERS: Mapping[str, Callable[[Mapping[str, Any]], DecoderConfig]] = {
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
    return found if found is not None else refuse(f"activation {name!r} is not one of {', '.join(_ACTIVATIONS)}")


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        refuse(f"config.json: {key} must be a positive whole number, not {value!r}")
    return value


def _number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        refuse(f"config.json: {key} must be a positive number, not {value!r}")
    return float(value)


def _types(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that all families read alike. `dtype` is the newer name of `torch_dtype`."""
    return {
        "bfloat16": "bfloat16" in (config.get("dtype"), config.get("torch_dtype")),
        "spread": _number(config, "initializer_range", 0.02),
    }


def _rotary(config: Mapping[str, Any], head_size: int) -> Rotary:
    """Read positions as transformers 5 writes them (`rope_parameters`) or 4 did (`rope_theta`, `rope_scaling`)."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        refuse(f"config.json: rope_parameters must be an object, not {given!r}")
    theta = _number(given, "rope_theta", _number(config, "rope_theta", 10000.0))
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return Rotary(size=head_size, theta=theta)
    if kind == "linear":
        return Rotary(size=head_size, theta=theta, stretch=_number(given, "factor"))
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        factor, low, high, context = (_number(given, key) for key in keys)
        return Rotary(size=head_size, theta=theta, frequency_scaling=(factor, low, high, context))
    refuse(f"rotary positions of type {kind!r} are not run, only default, linear and llama3")


_WEIGHTS = (WeightType.FLOAT16, WeightType.INT8, WeightType.INT4)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSlice:
    """The part of a model that one rank holds: some layers, and of each its share of heads and of feed-forward width.

    Ranks are counted stage by stage: rank = stage * tp + place.
    """

    tp: int
    pp: int
    stage: int
    place: int
    layers: range

    @property
    def first(self) -> bool:
        """Whether tokens come in here."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether tokens come out here."""
        return self.stage == self.pp - 1

    def share(self, count: int) -> range:
        """Return this rank's share of so many things in a row; uneven where tp does not divide them."""
        return range(count * self.place // self.tp, count * (self.place + 1) // self.tp)

    def kv_share(self, kv_heads: int) -> range:
        """Return this rank's KV heads; ranks that outnumber them share one."""
        if kv_heads >= self.tp:
            return self.share(kv_heads)
        mine = self.place * kv_heads // self.tp
        return range(mine, mine + 1)


def rank_slice(spec: EngineSpec, rank: int) -> RankSlice:
    """Return what `rank` holds of a split that `check` has passed."""
    stage, place = divmod(rank, spec.tp)
    start = sum(spec.layer_split[:stage])
    return RankSlice(
        tp=spec.tp, pp=spec.pp, stage=stage, place=place, layers=range(start, start + spec.layer_split[stage])
    )


def check_split(spec: EngineSpec, arch: DecoderConfig) -> None:
    """Refuse what this engine cannot split or store so.

    Raises:
        EngineError: with the reason, and the nearest thing it can do where there is one.
    """
    _check_types(spec)
    _check_split(spec, arch)
    _check_degree(spec.tp, arch)


def _check_types(spec: EngineSpec) -> None:
    if spec.weights == WeightType.INT4_GPTQ:
        refuse("int4_gptq needs weights that GPTQ has calibrated; the torch engine rounds to nearest: ask for int4")
    if spec.weights not in _WEIGHTS:
        refuse(f"weights {spec.weights!r} are not one of {', '.join(_WEIGHTS)}")
    if spec.kv not in tuple(KvType):
        refuse(f"KV cache {spec.kv!r} is not one of {', '.join(KvType)}")


def _check_split(spec: EngineSpec, arch: DecoderConfig) -> None:
    ranks = spec.tp * spec.pp
    if len(spec.devices) != ranks:
        refuse(f"TP {spec.tp} x PP {spec.pp} needs {ranks} devices, got {len(spec.devices)}")
    try:
        check_layer_split(spec.layer_split, spec.pp, arch.layers)
    except InputError as error:
        refuse(str(error))
    if len({device.partition(":")[0] for device in spec.devices}) > 1:
        refuse(f"devices {', '.join(spec.devices)} are of more than one kind")
    for device in spec.devices:
        kind, _, number = device.partition(":")
        if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
            refuse(f"device {device!r} is neither cpu nor cuda:N")


def _check_degree(tp: int, arch: DecoderConfig) -> None:
    def reason_against(degree: int) -> str | None:
        return why_tp_does_not_divide(degree, heads=arch.heads, feed_forward=arch.intermediate)

    if reason := reason_against(tp):
        fitting = max(degree for degree in range(1, tp) if reason_against(degree) is None)
        refuse(f"{reason}; the nearest that does is TP {fitting}")
    if arch.vocabulary < tp:
        refuse(f"TP {tp} leaves some rank without any of {arch.vocabulary} tokens")
    if reason := why_tp_does_not_divide(tp, kv_heads=arch.kv_heads):
        refuse(reason)
