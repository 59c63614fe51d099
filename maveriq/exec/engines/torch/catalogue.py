"""A `config.json` for a model of which only the shape is known, so that it runs with random weights."""

from __future__ import annotations

from typing import Any

from maveriq.domain.models import ModelSpec
from maveriq.exec.engines.torch.architecture import Family, refuse

_CONTEXT_TOKENS = 4096
_GPTJ_ROTARY_SIZE = 64


def hf_config(model: ModelSpec) -> dict[str, Any]:
    """Return the Hugging Face configuration of a model of this shape, ready for `json.dumps`.

    Raises:
        EngineError: the torch engine does not run its architecture.
    """
    if model.architecture == Family.LLAMA:
        family = _llama(model)
    elif model.architecture == Family.FALCON:
        family = _falcon(model)
    elif model.architecture == Family.GPTJ:
        family = _gptj(model)
    else:
        refuse(f"{model.name}: architecture {model.architecture!r} is not one of {', '.join(Family)}")
    return {"model_type": model.architecture, "vocab_size": model.vocab_size, "torch_dtype": "float16", **family}


def _llama(model: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.attention_heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": _CONTEXT_TOKENS,
        "tie_word_embeddings": False,
    }


def _falcon(model: ModelSpec) -> dict[str, Any]:
    """One KV head is the mark of the first decoder (multi-query), several are of the new one."""
    return {
        "architectures": ["FalconForCausalLM"],
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.attention_heads,
        "num_kv_heads": model.kv_heads,
        "ffn_hidden_size": model.intermediate_size,
        "multi_query": model.kv_heads == 1,
        "new_decoder_architecture": model.kv_heads > 1,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
        "max_position_embeddings": _CONTEXT_TOKENS,
        "tie_word_embeddings": True,
    }


def _gptj(model: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["GPTJForCausalLM"],
        "n_layer": model.layers,
        "n_embd": model.hidden_size,
        "n_head": model.attention_heads,
        "n_inner": model.intermediate_size,
        "n_positions": _CONTEXT_TOKENS,
        "rotary_dim": min(_GPTJ_ROTARY_SIZE, model.hidden_size // model.attention_heads),
        "tie_word_embeddings": False,
    }
