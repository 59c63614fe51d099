"""The Hugging Face configuration of a model that is known by its shape alone.

Where the files of models lie: their own configurations, and weights if there are any.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maveriq.domain.models import ModelSpec
from maveriq.errors import InputError
from maveriq.tables import read_text

_LONGEST_TEXT = 4096
_GPTJ_ROTARY = 64


def hf_config_json(model: ModelSpec) -> str:
    """Return a `config.json` of the model's shape, as its family writes one (an unknown one: as llama)."""
    write = {"falcon": _falcon, "gptj": _gptj}.get(model.architecture, _llama)
    return json.dumps({"model_type": model.architecture, "vocab_size": model.vocab_size} | write(model))


def _llama(model: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.attention_heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": _LONGEST_TEXT,
        "tie_word_embeddings": False,
    }


def _falcon(model: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["FalconForCausalLM"],
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.attention_heads,
        "num_kv_heads": model.kv_heads,
        "ffn_hidden_size": model.intermediate_size,
        # One KV head is the first decoder's way; with more of them it is the second's.
        "multi_query": model.kv_heads == 1,
        "new_decoder_architecture": model.kv_heads > 1,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
        "max_position_embeddings": _LONGEST_TEXT,
    }


def _gptj(model: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["GPTJForCausalLM"],
        "n_layer": model.layers,
        "n_embd": model.hidden_size,
        "n_head": model.attention_heads,
        "n_inner": model.intermediate_size,
        "rotary_dim": min(_GPTJ_ROTARY, model.hidden_size // model.attention_heads),
        "n_positions": _LONGEST_TEXT,
        "tie_word_embeddings": False,
    }


class ModelFiles:
    """The model files that engines get.

    Args:
        config_path: says where the configuration of a model lies, None for one that is known by its shape alone.
    """

    def __init__(self, config_path: Callable[[ModelSpec], Path | None] = lambda _model: None) -> None:
        self._config_path = config_path

    def config(self, model: ModelSpec) -> str:
        """Return a model's own configuration, else one of its shape.

        Where its own has gone it is empty: its engine then fails by itself, without bringing others down.
        """
        path = self._config_path(model)
        if path is None:
            return hf_config_json(model)
        try:
            return read_text(path, what="model configuration")
        except InputError:
            return "{}"

    def weights_folder(self, model: ModelSpec) -> str:
        """Return the folder of its configuration if there are weights in it, else nothing: then they are random."""
        path = self._config_path(model)
        return str(path.parent.resolve()) if path is not None and any(path.parent.glob("*.safetensors")) else ""
