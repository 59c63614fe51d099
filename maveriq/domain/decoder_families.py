"""What a `config.json` does not say but its family (`model_type`) implies, after the defaults of transformers.

A table, not logic: the reader (`maveriq.domain.decoder_config`) knows no family by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from maveriq.compat import StrEnum
from maveriq.domain.config_fields import Fields


class QueryKeyNorm(StrEnum):
    """How queries and keys are normalised: over each head with shared weights, or over all heads of a token."""

    NONE = "none"
    HEAD = "head"
    ALL_HEADS = "all heads"


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """A property that a key switches: the key ("" if the family has none) and what counts where it is absent."""

    key: str = ""
    default: bool = False


_OFF, _ON = Switch(), Switch(default=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A second way in which a family builds its decoders.

    Args:
        key: the key that says so.
        old_name: a `model_type` that says so, of files that have no such key; "" for none.
        family: what it implies.
    """

    key: str
    family: Family
    old_name: str = ""

    def is_chosen(self, fields: Fields) -> bool:
        """Return whether a configuration is built so.

        Raises:
            InputError: the key is neither true nor false.
        """
        named = bool(self.old_name) and fields.config.get("model_type") == self.old_name
        return fields.flag(self.key, default=False) or named


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a family of decoders implies.

    Args:
        feed_forward_matrices: 3 where feed-forward parts are gated, else 2.
        widening: their width in multiples of the hidden size where the file names none; 0 if it must.
        width_of_gate_too: whether the width that the file names is the gate's and the feed-forward part's together.
        parallel: whether attention and feed-forward part take the same input.
        multi_query: whether there is one KV head where the file says nothing.
        kv_heads_stated: whether the file must say how many KV heads there are; else none stated means one a head.
        head_size: the head size where the file says nothing; 0 for the hidden size divided by the heads.
        stated: keys that the family's files always have: without them nothing says how it is built.
        output_gate: whether queries come with a gate for the output.
        delta_net_but_every: all layers are gated delta nets but one in so many; 0: none is.
        full_head_size, full_kv_heads, full_key_is_value: the keys of these properties in layers without a window.
        experts_switch: the key that switches experts on.
        experts_beside_dense: layers with experts have the dense part too.
        layer_letters: each layer is one part: state space, attention, experts or dense, as a pattern says.
        indexer: whether an indexer picks the tokens that attention goes to.
        router_vectors, expert_norms: further vectors of layers with experts, of the hidden size.
        tied: whether the output uses the embedding where the file says nothing.
        qkv_bias, output_bias, feed_forward_bias: whether these matrices have a bias.
        head_bias: whether the output matrix has one.
        norms: norms of a layer. norms_in_parallel: the same where attention and feed-forward part take the same input;
            0 for as many. norms_key: the key that says how many; "" if none does.
        norm_values: vectors of a norm, 2 where it has a bias, 0 where it has no parameters.
        query_key_norm: how queries and keys are normalised. query_key_norm_values: vectors of these norms; 0 for as
            many as others have, at least 1.
        query_key_norm_key: the key that switches it; "" if it is always there.
        latent: whether attention is over a latent vector.
        windowed: whether a window that the file names counts; families with one of the next keys have windows too.
        window_default: the sliding window where the file names none; 0 for none.
        window_switch: the key that switches the window on; "" if a window that is named counts.
        full_every: one layer in so many has no window, the last of each group; 0: all layers have it.
        first_window_layer: the key with the number of layers at the start that have no window.
        window_list: the key of a list that says for each layer whether it has the window.
        experts: whether the family has experts. experts_use_width: they are as wide as `intermediate_size` says.
        experts_bias: whether router and experts have a bias. router_correction: the router has a correction.
        dense_width: the key with the width of layers without experts, where `intermediate_size` is the experts'.
        shared_like_expert: one shared expert as wide as a routed one in each layer with experts.
        shared_gate: the shared experts' output has a gate.
        embedding_norms: norms of the embedding. extra_positions: rows of learned positions that no token uses.
        learned_positions: whether positions are learned vectors.
        sinks: whether each head has a sink.
        positions_are_scaled: whether the positions that the file names are those after scaling.
        part_defaults: values that a part nested in a multimodal configuration leaves out (transformers does).
        variant: another way in which it builds its decoders, None if it has one alone.
    """

    feed_forward_matrices: int = 3
    widening: int = 0
    width_of_gate_too: bool = False
    parallel: Switch = _OFF
    multi_query: bool = False
    kv_heads_stated: bool = False
    head_size: int = 0
    stated: tuple[str, ...] = ()
    output_gate: Switch = _OFF
    delta_net_but_every: int = 0
    full_head_size: str = ""
    full_kv_heads: str = ""
    full_key_is_value: str = ""
    experts_switch: str = ""
    experts_beside_dense: bool = False
    layer_letters: bool = False
    indexer: bool = False
    router_vectors: int = 0
    expert_norms: int = 0
    tied: bool = False
    qkv_bias: Switch = _OFF
    output_bias: Switch = _OFF
    feed_forward_bias: Switch = _OFF
    head_bias: Switch = _OFF
    norms: int = 2
    norms_in_parallel: int = 0
    norms_key: str = ""
    norm_values: int = 1
    query_key_norm: QueryKeyNorm = QueryKeyNorm.NONE
    query_key_norm_key: str = ""
    query_key_norm_values: int = 0
    latent: bool = False
    windowed: bool = False
    window_default: int = 0
    window_switch: str = ""
    full_every: int = 0
    first_window_layer: str = ""
    window_list: str = ""
    experts: bool = False
    experts_use_width: bool = False
    experts_bias: bool = False
    router_correction: bool = False
    dense_width: str = ""
    shared_like_expert: bool = False
    shared_gate: bool = False
    embedding_norms: int = 0
    learned_positions: bool = False
    extra_positions: int = 0
    sinks: bool = False
    positions_are_scaled: bool = False
    part_defaults: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    variant: Variant | None = None

    @property
    def has_windows(self) -> bool:
        """Whether a window that the file names counts."""
        return self.windowed or bool(self.window_default or self.window_switch or self.full_every)


_ATTENTION_BIAS = Switch(key="attention_bias")
_LLAMA = {"qkv_bias": _ATTENTION_BIAS, "output_bias": _ATTENTION_BIAS, "feed_forward_bias": Switch(key="mlp_bias")}
_GPT = {
    "feed_forward_matrices": 2, "norm_values": 2, "qkv_bias": _ON, "output_bias": _ON, "feed_forward_bias": _ON,
}  # fmt: skip
_HEAD_NORM = QueryKeyNorm.HEAD


def _family(*parts: Mapping[str, object], **more: object) -> Family:
    values: dict[str, object] = {}
    for part in (*parts, more):
        values.update(part)
    return Family(**values)  # type: ignore[arg-type]


_QWEN3 = {
    "head_size": 128,
    "qkv_bias": _ATTENTION_BIAS, "output_bias": _ATTENTION_BIAS, "query_key_norm": _HEAD_NORM,
    "window_switch": "use_sliding_window", "first_window_layer": "max_window_layers", "kv_heads_stated": True,
}  # fmt: skip
_GEMMA = {
    "stated": ("head_dim",),
    "tied": True,
    "norms": 4,
    "kv_heads_stated": True,
    "qkv_bias": _ATTENTION_BIAS,
    "output_bias": _ATTENTION_BIAS,
}
_GEMMA3 = {
    **_GEMMA, "stated": ("head_dim", "sliding_window"), "query_key_norm": _HEAD_NORM, "full_every": 6,
    "window_default": 4096, "positions_are_scaled": True,
    "part_defaults": MappingProxyType(
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
         "max_position_embeddings": 131072}
    ),
}  # fmt: skip
_QWEN3_NEXT = {
    "head_size": 256,
    "qkv_bias": _ATTENTION_BIAS, "output_bias": _ATTENTION_BIAS, "query_key_norm": _HEAD_NORM,
    "kv_heads_stated": True, "delta_net_but_every": 4,
}  # fmt: skip
_SHARED_GATE = {"experts": True, "shared_gate": True, "stated": ("shared_expert_intermediate_size",)}
_OUTPUT_GATE = Switch(key="attn_output_gate", default=True)
_SHARED_AND_DENSE = ("n_shared_experts", "first_k_dense_replace")
_DEEPSEEK = {
    "stated": _SHARED_AND_DENSE, "latent": True, "experts": True, "router_correction": True,
    "qkv_bias": _ATTENTION_BIAS,
}  # fmt: skip
_PHI = {
    "head_bias": _ON, "parallel": _ON, "norms": 1, "query_key_norm": _HEAD_NORM, "query_key_norm_key": "qk_layernorm",
}  # fmt: skip

_FALCON = {
    "feed_forward_matrices": 2, "widening": 4, "tied": True, "norm_values": 2,
    "qkv_bias": Switch(key="bias"), "output_bias": Switch(key="bias"), "feed_forward_bias": Switch(key="bias"),
}  # fmt: skip

FAMILIES: Mapping[str, Family] = {
    # Gated, after llama.
    **dict.fromkeys(
        ("llama", "code_llama", "yi", "deepseek", "aquila", "smollm", "internlm", "minicpm",
         "iquestcoder", "exaone", "granite", "internlm2", "internlm3", "baichuan", "xverse", "orion"),
        _family(_LLAMA),
    ),
    "arcee": _family(_LLAMA, feed_forward_matrices=2),
    "apertus": _family(_LLAMA, feed_forward_matrices=2, query_key_norm=_HEAD_NORM),
    "hyperclovax": _family(_LLAMA, norms=4),
    "smollm3": _family(_LLAMA, tied=True, window_switch="use_sliding_window"),
    "mistral": _family(window_default=4096, kv_heads_stated=True),
    "ministral": _family(window_default=4096, kv_heads_stated=True),
    "ministral3": _family(kv_heads_stated=True),
    "mixtral": _family(windowed=True, experts=True, experts_use_width=True, kv_heads_stated=True),
    "qwen": _family(qkv_bias=_ON, width_of_gate_too=True),
    **dict.fromkeys(
        ("qwen2", "mimo"),
        _family(
            qkv_bias=_ON, kv_heads_stated=True, window_switch="use_sliding_window",
            first_window_layer="max_window_layers",
        ),
    ),
    "qwen2_moe": _family(
        stated=("shared_expert_intermediate_size",),
        qkv_bias=Switch(key="qkv_bias", default=True), window_switch="use_sliding_window",
        first_window_layer="max_window_layers", experts=True, shared_gate=True,
    ),
    "qwen3": _family(_QWEN3),
    "qwen3_moe": _family(_QWEN3, experts=True, stated=("head_dim",)),
    "phi3": _family(kv_heads_stated=True, windowed=True),
    "phimoe": _family(_LLAMA, windowed=True, experts=True, experts_use_width=True, kv_heads_stated=True, norm_values=2),
    "olmo": _family(_LLAMA, norm_values=0),
    "olmo2": _family(_LLAMA, query_key_norm=QueryKeyNorm.ALL_HEADS),
    "olmo3": _family(_LLAMA, query_key_norm=QueryKeyNorm.ALL_HEADS, window_default=4096, full_every=4),
    "olmoe": _family(_LLAMA, query_key_norm=QueryKeyNorm.ALL_HEADS, experts=True, experts_use_width=True),
    "exaone4": _family(query_key_norm=_HEAD_NORM, window_default=4096, full_every=4, kv_heads_stated=True),
    "granitemoe": _family(_LLAMA, experts=True, experts_use_width=True),
    "granitemoeshared": _family(
        _LLAMA, experts=True, experts_use_width=True, stated=("shared_intermediate_size",)
    ),
    "seed_oss": _family(
        head_size=128,
        qkv_bias=Switch(key="attention_bias", default=True), output_bias=Switch(key="attention_out_bias"),
        feed_forward_bias=Switch(key="mlp_bias"), kv_heads_stated=True,
    ),
    "stablelm": _family(
        norm_values=2, norms_in_parallel=1, parallel=Switch(key="use_parallel_residual"),
        qkv_bias=Switch(key="use_qkv_bias"), query_key_norm=QueryKeyNorm.ALL_HEADS, query_key_norm_key="qk_layernorm",
        query_key_norm_values=1,
    ),
    "chatglm": _family(qkv_bias=Switch(key="add_qkv_bias"), feed_forward_bias=Switch(key="add_bias_linear")),
    "glm": _family(head_size=128, qkv_bias=Switch(key="attention_bias", default=True), kv_heads_stated=True),
    "glm4": _family(head_size=128, qkv_bias=Switch(key="attention_bias", default=True), norms=4, kv_heads_stated=True),
    "glm4_moe": _family(
        stated=("head_dim", *_SHARED_AND_DENSE),
        qkv_bias=_ATTENTION_BIAS, query_key_norm=_HEAD_NORM, query_key_norm_key="use_qk_norm", experts=True,
        router_correction=True, kv_heads_stated=True,
    ),
    "glm4_moe_lite": _family(_DEEPSEEK),
    "ernie4_5": _family(
        tied=True, qkv_bias=Switch(key="use_bias"), output_bias=Switch(key="use_bias"),
        feed_forward_bias=Switch(key="use_bias"), kv_heads_stated=True,
    ),
    "ernie4_5_moe": _family(
        tied=True, qkv_bias=Switch(key="use_bias"), output_bias=Switch(key="use_bias"),
        feed_forward_bias=Switch(key="use_bias"), head_bias=Switch(key="use_bias"), experts=True,
        router_correction=True, kv_heads_stated=True,
    ),
    "hunyuan_v1_dense": _family(_LLAMA, query_key_norm=_HEAD_NORM, query_key_norm_key="use_qk_norm"),
    "hunyuan_v1_moe": _family(
        _LLAMA, query_key_norm=_HEAD_NORM, query_key_norm_key="use_qk_norm", experts=True, experts_use_width=True,
        shared_like_expert=True,
    ),
    "bailing_moe": _family(
        stated=("num_shared_experts", "first_k_dense_replace"),
        qkv_bias=Switch(key="use_qkv_bias"), output_bias=Switch(key="use_bias"), experts=True,
    ),
    "bailing_moe_v2": _family(
        stated=("num_shared_experts", "first_k_dense_replace"),
        qkv_bias=Switch(key="use_qkv_bias"), output_bias=Switch(key="use_bias"), experts=True,
        query_key_norm=_HEAD_NORM, query_key_norm_key="use_qk_norm", router_correction=True,
    ),
    "dots1": _family(
        _LLAMA, query_key_norm=_HEAD_NORM, experts=True, router_correction=True, window_switch="use_sliding_window",
        stated=_SHARED_AND_DENSE,
    ),
    "deepseek_v2": _family(_DEEPSEEK, router_correction=False, feed_forward_bias=Switch(key="mlp_bias")),
    "deepseek_v3": _family(_DEEPSEEK),
    "deepseek_v32": _family(_DEEPSEEK, indexer=True),
    "glm_moe_dsa": _family(_DEEPSEEK, indexer=True),
    "qwen3_next": _family(_QWEN3_NEXT, _SHARED_GATE, output_gate=_ON),
    "qwen3_5": _family(_QWEN3_NEXT, output_gate=_OUTPUT_GATE),
    "qwen3_5_moe": _family(_QWEN3_NEXT, _SHARED_GATE, output_gate=_OUTPUT_GATE),
    "nemotron_h": _family(
        head_size=128,
        feed_forward_matrices=2, norms=1, experts=True, router_correction=True, layer_letters=True,
        qkv_bias=_ATTENTION_BIAS, output_bias=_ATTENTION_BIAS, feed_forward_bias=Switch(key="mlp_bias"),
        kv_heads_stated=True,
    ),
    "gemma4": _family(
        _GEMMA, query_key_norm=_HEAD_NORM, full_every=6, window_default=512, full_head_size="global_head_dim",
        full_kv_heads="num_global_key_value_heads", full_key_is_value="attention_k_eq_v", experts=True,
        experts_switch="enable_moe_block", experts_beside_dense=True, expert_norms=3, router_vectors=1,
        router_correction=True,
    ),
    "gpt_oss": _family(
        head_size=64,
        qkv_bias=Switch(key="attention_bias", default=True), output_bias=Switch(key="attention_bias", default=True),
        window_default=128, full_every=2, experts=True, experts_use_width=True, experts_bias=True, sinks=True,
        kv_heads_stated=True,
    ),
    "llama4": _family(
        _LLAMA, head_size=128, stated=("interleave_moe_layer_step", "intermediate_size_mlp"), experts=True,
        experts_use_width=True, dense_width="intermediate_size_mlp", shared_like_expert=True,
        window_default=8192, full_every=4, window_list="no_rope_layers", kv_heads_stated=True,
    ),
    "minimax_m2": _family(
        head_size=128,
        query_key_norm=QueryKeyNorm.ALL_HEADS, query_key_norm_key="use_qk_norm", experts=True, experts_use_width=True,
        router_correction=True, kv_heads_stated=True,
    ),
    "step3p7": _family(
        stated=("head_dim", "first_k_dense_replace", "share_expert_dim", "layer_types"),
        query_key_norm=_HEAD_NORM, experts=True, router_correction=True, kv_heads_stated=True,
    ),
    "dbrx": _family(experts=True, norm_values=1, kv_heads_stated=True),
    "cohere": _family(
        _LLAMA, tied=True, parallel=_ON, norms=1, query_key_norm=QueryKeyNorm.ALL_HEADS,
        query_key_norm_key="use_qk_norm",
    ),
    "cohere2": _family(_LLAMA, tied=True, parallel=_ON, norms=1, window_default=4096, full_every=4),
    "gemma": _family(_GEMMA, norms=2),
    "gemma2": _family(_GEMMA, window_default=4096, full_every=2),
    "gemma3": _family(_GEMMA3),
    # Plain feed-forward parts.
    "falcon": _family(
        _FALCON, parallel=Switch(key="parallel_attn", default=True), norms_in_parallel=1, multi_query=True,
        # That of falcon-40b has several KV heads, and norms the inputs of both parts. RefinedWeb is its old name.
        variant=Variant(
            key="new_decoder_architecture", old_name="RefinedWeb",
            family=_family(_FALCON, parallel=_ON, norms_key="num_ln_in_parallel_attn", kv_heads_stated=True),
        ),
    ),
    "gptj": Family(
        feed_forward_matrices=2, widening=4, parallel=_ON, norms=1, norm_values=2, feed_forward_bias=_ON,
        head_bias=_ON,
    ),
    "codegen": Family(
        feed_forward_matrices=2, widening=4, parallel=_ON, norms=1, norm_values=2, feed_forward_bias=_ON,
        head_bias=_ON,
    ),
    "gpt_neox": _family(
        _GPT, parallel=Switch(key="use_parallel_residual", default=True),
        qkv_bias=Switch(key="attention_bias", default=True), output_bias=Switch(key="attention_bias", default=True),
    ),
    "phi": _family(_GPT, _PHI),
    "gpt_bigcode": _family(_GPT, widening=4, multi_query=True, tied=True, learned_positions=True),
    "gpt2": _family(_GPT, widening=4, tied=True, learned_positions=True),
    "openai-gpt": _family(_GPT, widening=4, tied=True, learned_positions=True),
    "gpt_neo": _family(_GPT, widening=4, tied=True, learned_positions=True, qkv_bias=_OFF),
    "bloom": _family(_GPT, widening=4, tied=True, embedding_norms=1),
    "opt": _family(_GPT, tied=True, learned_positions=True, extra_positions=2),
    "mpt": Family(feed_forward_matrices=2, widening=4, tied=True),
    "starcoder2": _family(
        _GPT, windowed=True, tied=True, kv_heads_stated=True, qkv_bias=Switch(key="use_bias", default=True),
        output_bias=Switch(key="use_bias", default=True), feed_forward_bias=Switch(key="use_bias", default=True),
    ),
    "persimmon": _family(_GPT, query_key_norm=_HEAD_NORM, query_key_norm_key="qk_layernorm"),
    "nemotron": _family(_LLAMA, feed_forward_matrices=2, norm_values=2),
    "xglm": _family(_GPT, tied=True),
    "biogpt": _family(_GPT, tied=True, learned_positions=True, extra_positions=2),
}  # fmt: skip

OTHER_NAMES: Mapping[str, str] = {
    "RefinedWeb": "falcon",
    "RefinedWebModel": "falcon",
    "kimi_k2": "deepseek_v3",
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "glm4v": "glm4",
    "glm4v_moe": "glm4_moe",
    "step3p5": "step3p7",
    "phi-msft": "phi",
    "InternLM2ForCausalLM": "internlm2",
}
"""Other names of a family: older ones, and those of its decoder within a multimodal model."""
