"""Models: the shape of a decoder-only transformer, and how its numbers are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from maveriq.errors import InputError


class WeightType(StrEnum):
    """How weights are stored. Order is the order of enumeration (SPEC 4)."""

    FLOAT16 = "float16"
    INT8 = "int8"
    INT4 = "int4"
    INT4_GPTQ = "int4_gptq"


class KvType(StrEnum):
    """How the KV cache is stored; `NATIVE` follows the activations. INT8 is enumerated first."""

    INT8 = "int8"
    NATIVE = "native"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The shape of a model, as its Hugging Face `config.json` gives it.

    A feed-forward part has three matrices where it is gated, else two. A layer split by tensor
    parallelism is summed up over the GPUs twice, or once where attention and feed-forward part
    run side by side.

    Raises:
        InputError: a count is not positive.
    """

    name: str
    architecture: str
    layers: int
    hidden_size: int
    attention_heads: int
    kv_heads: int
    intermediate_size: int
    vocab_size: int
    feed_forward_matrices: int = 3
    all_reduces_per_layer: int = 2

    def __post_init__(self) -> None:
        for field in (field.name for field in fields(self) if field.name not in ("name", "architecture")):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"model {self.name!r}: {field} must be a positive whole number, not {value!r}")

    def tensor_parallel_degrees(self, gpus: int) -> list[int]:
        """Return the powers of two up to `gpus` that divide the attention heads, ascending."""
        degrees = (1 << k for k in range(gpus.bit_length()))
        return [tp for tp in degrees if tp <= gpus and self.attention_heads % tp == 0]


# Hugging Face names one thing differently per family; the first key present wins.
_HF_KEYS: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "attention_heads": ("num_attention_heads", "n_head", "num_heads"),
    "vocab_size": ("vocab_size",),
}

# What a configuration does not say but its family implies; every other family is built like llama.
_FAMILIES: Mapping[str, Mapping[str, int]] = {
    "falcon": {"feed_forward_matrices": 2, "all_reduces_per_layer": 1},
    "gptj": {"feed_forward_matrices": 2, "all_reduces_per_layer": 1},
    "gpt_neox": {"feed_forward_matrices": 2, "all_reduces_per_layer": 1},
    "gpt2": {"feed_forward_matrices": 2},
    "opt": {"feed_forward_matrices": 2},
    "bloom": {"feed_forward_matrices": 2},
}


def model_from_hf_config(config: Mapping[str, Any], *, name: str, where: str) -> ModelSpec:
    """Read a Hugging Face `config.json` (already parsed) into a `ModelSpec`.

    Args:
        config: the parsed file.
        name: the model's name, by which profiles are found.
        where: the file's name, for messages.

    Raises:
        InputError: a needed key is missing or is not a positive whole number.
    """
    found: dict[str, Any] = {}
    for field, keys in _HF_KEYS.items():
        present = [key for key in keys if config.get(key) is not None]
        if not present:
            raise InputError(f"{where}: no {' or '.join(keys)}; is it the config.json of a decoder-only model?")
        found[field] = config[present[0]]
    heads, hidden = found["attention_heads"], found["hidden_size"]
    return ModelSpec(
        name=name,
        architecture=str(config.get("model_type", "unknown")),
        kv_heads=_kv_heads(config, heads),
        # GPT-J and falcon write nothing where the feed-forward part is four times as wide.
        intermediate_size=_first(config, ("intermediate_size", "n_inner", "ffn_hidden_size"), _times(hidden, 4)),
        **_FAMILIES.get(str(config.get("model_type")), {}),
        **found,
    )


def _first(config: Mapping[str, Any], keys: tuple[str, ...], default: Any) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), default)


def _times(value: Any, factor: int) -> Any:
    """Multiply, leaving what is no number for `ModelSpec` to refuse by name."""
    return value * factor if isinstance(value, int) else value


def _kv_heads(config: Mapping[str, Any], heads: Any) -> Any:
    # Falcon's `num_kv_heads` counts only in the new decoder; the old one has a single KV head
    # when `multi_query` is set, as it is unless said otherwise (transformers, FalconConfig).
    multi_query = config.get("multi_query", config.get("model_type") == "falcon")
    if multi_query and not config.get("new_decoder_architecture"):
        return 1
    return _first(config, ("num_key_value_heads", "num_kv_heads"), heads)
