"""What a `config.json` may describe that maveriq does not model, recognised by key and by family.

It has other weights, another KV cache or other operations than the keys that are read suggest: it is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from maveriq.domain.decoder_families import Family

_Config: TypeAlias = Mapping[str, Any]

TEXT_PARTS = ("text_config", "llm_config", "language_config", "language_model_config")
"""The keys under which a multimodal configuration has its decoder."""

EXPERT_KEYS = (
    "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts", "num_moe_experts",
    "moe_num_routed_experts",
)  # fmt: skip
"""The keys that say how many experts a layer has."""

_OTHER_PARTS = re.compile(r"(vision|visual|audio|speech|image|video)\w*_config")
_ENCODERS = re.compile(
    r"(.*[-_])?(bert|bert-generation|roberta|xlm-roberta|xlm-roberta-xl|distilbert|albert|camembert|deberta|deberta-v2|"
    r"electra|modernbert|mpnet|longformer|big_bird|nystromformer|squeezebert|funnel|ernie|layoutlm|layoutlmv2|"
    r"layoutlmv3|esm|nomic_bert|vit|deit|beit|swin|dinov2|siglip_vision_model|wav2vec2|hubert|wavlm)"
)
_ENCODER_DECODERS = re.compile(
    r"t5|mt5|umt5|longt5|switch_transformers|bart|mbart|pegasus|pegasus_x|whisper|marian|m2m_100|blenderbot|"
    r"blenderbot-small|led|bigbird_pegasus|prophetnet|xlm-prophetnet|fsmt|plbart|mvp|nllb-moe|speech_to_text|"
    r"seamless_m4t\w*|speecht5|encoder-decoder|vision-encoder-decoder|speech-encoder-decoder|moonshine|trocr"
)
_STATE_SPACE = re.compile(
    r".*(mamba|rwkv|jamba|zamba|bamba|hyena|retnet|xlstm|griffin|recurrent).*|falcon_h1|plamo2|lfm2\w*|"
    r"granitemoehybrid|kimi_linear|bailing_hybrid"
)
_STATE_SPACE_KEYS = re.compile(
    r"(ssm|mamba|rwkv)_\w+|state_size|time_step_\w+|hybrid_override_pattern|attn_layer_(period|offset)|layers_block_type|"
    r"block_types|linear_(num|key|value|conv)_\w+|conv_(kernel|L_cache)"
)
_OTHER_TASKS = re.compile(
    r"\w+For(MaskedLM|SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|ImageClassification)"
)
_EXPERTS = re.compile(r"moe|moe_\w+|\w+_moe|\w*experts?(_\w+)?")
_OTHER_ATTENTION = {
    "a KV cache shared by layers": (
        "num_kv_shared_layers", "use_cla", "cla_share_factor", "share_kv", "kv_share", "num_kv_reuse_layers",
    ),
    "sparse attention": ("sparse_attention_config",),
    "compressed attention": ("compress_ratios", "o_lora_rank", "hc_mult"),
}  # fmt: skip
_INDEXER = ("index_topk", "index_n_heads", "index_head_dim")
_OTHER_EXPERTS = ("zero_expert_num", "use_double_wide_mlp", "use_mixed_mlp_moe")
_UNEQUAL_LAYERS = ("block_configs", "num_key_value_heads_per_layer", "num_query_heads", "ffn_multipliers")


def unmodelled_feature(config: _Config, family: str, known: Family | None) -> str | None:
    """Return what of a configuration maveriq does not model, in one clause that names the key; None if it models all.

    Args:
        config: the parsed `config.json`.
        family: its `model_type`.
        known: what the family implies, None if it is not known.
    """
    modelled: list[Callable[[_Config, str], str | None]] = []
    if known is not None and (known.delta_net_but_every or known.layer_letters):
        modelled += [_state_space, _latent_experts]
    if known is not None and known.indexer:
        modelled.append(_indexer)
    return next((reason for find in _FEATURES if find not in modelled and (reason := find(config, family))), None)


def other_inputs_of(config: _Config) -> str:
    """Return the key of the part that encodes other inputs than text, "" where there is none."""
    return next((key for key, value in config.items() if _OTHER_PARTS.fullmatch(key) and value), "")


def first_expert_key(config: _Config) -> str | None:
    """Return the first key that speaks of experts."""
    parts = (part for part in (config, config.get("ffn_config"), config.get("moe")) if isinstance(part, dict))
    return next((key for part in parts for key in part if _EXPERTS.fullmatch(key) and _is_on(part[key])), None)


def _not_a_decoder(config: _Config, family: str) -> str | None:
    if _ENCODER_DECODERS.fullmatch(family) or _is_on(config.get("is_encoder_decoder")):
        return f"{family} is an encoder-decoder; maveriq models decoder-only models"
    if isinstance(config.get("encoder"), dict) and isinstance(config.get("decoder"), dict):
        return f"{family} is an encoder-decoder (encoder, decoder); maveriq models decoder-only models"
    if _ENCODERS.fullmatch(family):
        return f"{family} is an encoder; maveriq models decoder-only models"
    if _is_on(config.get("add_cross_attention")):
        return "cross-attention (add_cross_attention) is not modelled"
    architectures = config.get("architectures")
    for name in architectures if isinstance(architectures, list) else ():
        if isinstance(name, str) and _OTHER_TASKS.fullmatch(name):
            return f"architectures names {name[:60]}, which does not generate text"
    return None


def _state_space(config: _Config, family: str) -> str | None:
    if _STATE_SPACE.fullmatch(family):
        return f"{family} has state-space or recurrent layers, which are not modelled"
    key = next((key for key, value in config.items() if _STATE_SPACE_KEYS.fullmatch(key) and _is_on(value)), None)
    return f"state-space or recurrent layers ({key}) are not modelled" if key else None


def _attention(config: _Config, family: str) -> str | None:
    del family
    for what, keys in _OTHER_ATTENTION.items():
        key = next((key for key in keys if _is_on(config.get(key))), None)
        if key is not None:
            return f"{what} ({key}) is not modelled"
    kinds = config.get("attn_type_list")
    if isinstance(kinds, list) and any(kind != 1 for kind in kinds):
        return "linear attention (attn_type_list) is not modelled"
    return None


def _indexer(config: _Config, family: str) -> str | None:
    del family
    key = next((key for key in _INDEXER if _is_on(config.get(key))), None)
    return f"sparse attention by an indexer ({key}) is not modelled" if key else None


def _latent_experts(config: _Config, family: str) -> str | None:
    del family
    return "experts of this kind (moe_latent_size) are not modelled" if _is_on(config.get("moe_latent_size")) else None


def _other_experts(config: _Config, family: str) -> str | None:
    del family
    key = next((key for key in _OTHER_EXPERTS if _is_on(config.get(key))), None)
    return f"experts of this kind ({key}) are not modelled" if key else None


def _unequal_layers(config: _Config, family: str) -> str | None:
    del family
    key = next((key for key in _UNEQUAL_LAYERS if isinstance(config.get(key), list)), None)
    if key is None and _is_on(config.get("hidden_size_per_layer_input")):
        key = "hidden_size_per_layer_input"
    return f"layers that differ from each other ({key}) are not modelled" if key else None


def _local_attention(config: _Config, family: str) -> str | None:
    # GPT-Neo attends locally in every second layer.
    kinds = str(config.get("attention_types") or config.get("attention_layers") or "local")
    return "local attention (attention_types) is not modelled" if family == "gpt_neo" and "local" in kinds else None


def _is_on(value: object) -> bool:
    """Return whether a value asks for something: a number above 0, true, or what is not empty."""
    return value > 0 if isinstance(value, int | float) else bool(value)


_FEATURES: tuple[Callable[[_Config, str], str | None], ...] = (
    _not_a_decoder,
    _state_space,
    _attention,
    _indexer,
    _latent_experts,
    _other_experts,
    _unequal_layers,
    _local_attention,
)
