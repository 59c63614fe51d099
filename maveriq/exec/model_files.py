"""The model files that engines load: the Hugging Face `config.json`, and the weights if there are any.

A model that comes without files gets a `config.json` made from its shape, and random weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maveriq.domain.models import ModelSpec
from maveriq.errors import InputError
from maveriq.tables import read_text

_CONTEXT_TOKENS = 4096
_GPTJ_ROTARY_SIZE = 64


def hf_config_json(model: ModelSpec) -> str:
    """Return a `config.json` with the model's shape in the format of its architecture; llama's if that is unknown."""
    architecture_keys = {"falcon": _falcon_keys, "gptj": _gptj_keys}.get(model.architecture, _llama_keys)
    return json.dumps({"model_type": model.architecture, "vocab_size": model.vocab_size} | architecture_keys(model))


def _llama_keys(model: ModelSpec) -> dict[str, Any]:
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


def _falcon_keys(model: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["FalconForCausalLM"],
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.attention_heads,
        "num_kv_heads": model.kv_heads,
        "ffn_hidden_size": model.intermediate_size,
        # Falcon's first decoder has one KV head, its new decoder several.
        "multi_query": model.kv_heads == 1,
        "new_decoder_architecture": model.kv_heads > 1,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
        "max_position_embeddings": _CONTEXT_TOKENS,
    }


def _gptj_keys(model: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["GPTJForCausalLM"],
        "n_layer": model.layers,
        "n_embd": model.hidden_size,
        "n_head": model.attention_heads,
        "n_inner": model.intermediate_size,
        "rotary_dim": min(_GPTJ_ROTARY_SIZE, model.hidden_size // model.attention_heads),
        "n_positions": _CONTEXT_TOKENS,
        "tie_word_embeddings": False,
    }


class ModelFiles:
    """Finds the files of models.

    Args:
        config_path: returns the path of a model's `config.json`, None if it has no files.
    """

    def __init__(self, config_path: Callable[[ModelSpec], Path | None] = lambda _model: None) -> None:
        self._config_path = config_path

    def config_json(self, model: ModelSpec) -> str:
        """Return the content of a model's `config.json`, or one made from its shape.

        If the file can no longer be read, return "{}": then only the engine of this model fails.
        """
        path = self._config_path(model)
        if path is None:
            return hf_config_json(model)
        try:
            return read_text(path, what="model configuration")
        except InputError:
            return "{}"

    def weights_folder(self, model: ModelSpec) -> str:
        """Return the folder of a model's weights, "" if it has none (random weights)."""
        path = self._config_path(model)
        return str(path.parent.resolve()) if path is not None and any(path.parent.glob("*.safetensors")) else ""
