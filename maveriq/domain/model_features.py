"""What a `config.json` may describe that maveriq does not model, recognised by key and by family.

maveriq models decoders of equal layers with full attention over one KV cache per layer. Anything else has other
weights, another KV cache or other operations than its shape suggests, so it is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

_Config: TypeAlias = Mapping[str, Any]

_TEXT_PARTS = ("text_config", "llm_config", "language_config", "language_model_config", "thinker_config")
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
    r".*(mamba|rwkv|jamba|zamba|bamba|hyena|retnet|xlstm|griffin|recurrent).*|nemotron_h|falcon_h1|plamo2|lfm2\w*|"
    r"qwen3_next|granitemoehybrid|kimi_linear"
)
_STATE_SPACE_KEYS = re.compile(
    r"(ssm|mamba|rwkv)_\w+|state_size|time_step_\w+|hybrid_override_pattern|attn_layer_(period|offset)|layers_block_type|"
    r"block_types|linear_(num|key|value|conv)_\w+|conv_(kernel|L_cache)"
)
_OTHER_TASKS = re.compile(
    r"\w+For(MaskedLM|SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|ImageClassification)"
)
_EXPERTS = re.compile(r"moe|moe_\w+|\w+_moe|\w*experts?(_\w+)?")
_NUMBER_OF_EXPERTS = re.compile(r"(moe_)?(num|n)_(local_|routed_|moe_|total_)?experts|expert_(num|count)")
_LATENT_ATTENTION = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_SHARED_KV = ("num_kv_shared_layers", "use_cla", "cla_share_factor", "share_kv", "kv_share", "num_kv_reuse_layers")
_UNEQUAL_LAYERS = ("block_configs", "num_key_value_heads_per_layer", "num_query_heads", "ffn_multipliers")
_WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_chunk_size",
    "attention_window",
    "local_attention_window",
)
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len")


def unmodelled_feature(config: _Config, family: str) -> str | None:
    """Return what of a configuration maveriq does not model, in one clause that names the key; None if it models all.

    Args:
        config: the parsed `config.json`.
        family: its `model_type`.
    """
    return next((reason for find in _FEATURES if (reason := find(config, family))), None)


def _other_inputs(config: _Config, family: str) -> str | None:
    text = next((key for key in _TEXT_PARTS if isinstance(config.get(key), dict) and config[key]), None)
    other = next(
        (key for key, value in config.items() if _OTHER_PARTS.fullmatch(key) and isinstance(value, dict)), None
    )
    if text is not None:
        return (
            f"{family} is a multimodal configuration, whose decoder lies under {text}; maveriq models text alone: save "
            "that part as a config.json of its own"
        )
    return f"{family} is a multimodal configuration ({other}); maveriq models text alone" if other else None


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


def _experts(config: _Config, family: str) -> str | None:
    del family
    keys = {
        key: value
        for part in (config, config.get("ffn_config"), config.get("moe"))
        if isinstance(part, dict)
        for key, value in part.items()
        if _EXPERTS.fullmatch(key) and _is_on(value)
    }
    numbers = [value for key, value in keys.items() if _NUMBER_OF_EXPERTS.fullmatch(key)]
    if numbers and all(value == 1 for value in numbers):
        return None
    key = next((key for key in keys if _NUMBER_OF_EXPERTS.fullmatch(key)), next(iter(keys), None))
    return f"experts ({key}) are not modelled" if key else None


def _attention(config: _Config, family: str) -> str | None:
    del family
    for what, keys in (("latent attention", _LATENT_ATTENTION), ("a KV cache shared by layers", _SHARED_KV)):
        key = next((key for key in keys if _is_on(config.get(key))), None)
        if key is not None:
            return f"{what} ({key}) is not modelled"
    return None


def _unequal_layers(config: _Config, family: str) -> str | None:
    del family
    key = next((key for key in _UNEQUAL_LAYERS if isinstance(config.get(key), list)), None)
    if key is None and _is_on(config.get("hidden_size_per_layer_input")):
        key = "hidden_size_per_layer_input"
    return f"layers that differ from each other ({key}) are not modelled" if key else None


def _window(config: _Config, family: str) -> str | None:
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and kinds:
        other = next((kind for kind in kinds if kind != "full_attention"), None)
        return None if other is None else f"layers of type {str(other)[:60]!r} (layer_types) are not modelled"
    # GPT-Neo attends locally in every second layer.
    if family == "gpt_neo" and "local" in str(
        config.get("attention_types") or config.get("attention_layers") or "local"
    ):
        return "local attention (attention_types) is not modelled"
    if config.get("use_sliding_window") is False:
        return None
    for key in _WINDOWS:
        window = config.get(key)
        if _is_on(window) and window != -1 and not _never_reached(config, window):
            return f"a sliding window ({key} {str(window)[:20]}) is not modelled"
    return None


def _never_reached(config: _Config, window: object) -> bool:
    """Return whether no sequence is longer than the window, or no layer has it."""
    context = next((config[key] for key in _CONTEXT if isinstance(config.get(key), int)), None)
    if isinstance(window, int) and context is not None and window >= context:
        return True
    first, layers = config.get("max_window_layers"), config.get("num_hidden_layers")
    return isinstance(first, int) and isinstance(layers, int) and first >= layers


def _is_on(value: object) -> bool:
    """Return whether a value asks for something: a number above 0, true, or what is not empty."""
    return value > 0 if isinstance(value, int | float) else bool(value)


_FEATURES: tuple[Callable[[_Config, str], str | None], ...] = (
    _other_inputs,
    _not_a_decoder,
    _state_space,
    _experts,
    _attention,
    _unequal_layers,
    _window,
)
