"""Hugging Face configurations of tiny models."""

import json
from typing import Any

from maveriq.exec.messages import EngineSpec

TINY: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "falcon": {
        "model_type": "falcon",
        "architectures": ["FalconForCausalLM"],
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "bias": False,
        "alibi": False,
        "vocab_size": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gptj": {
        "model_type": "gptj",
        "architectures": ["GPTJForCausalLM"],
        "n_layer": 4,
        "n_embd": 128,
        "n_head": 4,
        "rotary_dim": 32,
        "n_positions": 256,
        "vocab_size": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def spec(family: str = "llama", **changes: Any) -> EngineSpec:
    """Return the spec of a tiny model (default: float16 on one GPU) with changes."""
    fields: dict[str, Any] = {
        "deployment_id": 1,
        "generation": 1,
        "model": f"tiny-{family}",
        "config_json": json.dumps(TINY[family]),
        "tp": 1,
        "pp": 1,
        "layer_split": (4,),
        "weights": "float16",
        "kv": "native",
        "batch_size": 2,
        "devices": ("cuda:0",),
    }
    fields |= changes
    if "devices" not in changes:
        fields["devices"] = tuple(f"cuda:{rank}" for rank in range(fields["tp"] * fields["pp"]))
    return EngineSpec(**fields)
