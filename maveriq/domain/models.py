"""Models: the shape of a decoder-only transformer, and how its numbers are stored.

The models maveriq knows by name, and models read from a Hugging Face `config.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cache
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import msgspec

from maveriq.errors import InputError, UnknownNameError
from maveriq.files import data_path, exists, is_folder
from maveriq.tables import read_text, read_toml


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
    # when `multi_query` is set, which is the default (transformers, FalconConfig).
    multi_query = config.get("multi_query", config.get("model_type") == "falcon")
    if multi_query and not config.get("new_decoder_architecture"):
        return 1
    return _first(config, ("num_key_value_heads", "num_kv_heads"), heads)


class _Entry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    architecture: str
    layers: int
    hidden_size: int
    attention_heads: int
    kv_heads: int
    intermediate_size: int
    vocab_size: int
    feed_forward_matrices: int
    all_reduces_per_layer: int
    source: str


@cache
def known_models() -> Mapping[str, ModelSpec]:
    """Return the models of the catalogue by name."""
    entries = read_toml(data_path("models.toml"), dict[str, _Entry], what="model catalogue")
    specs: dict[str, ModelSpec] = {}
    for name, entry in entries.items():
        shape = msgspec.structs.asdict(entry)
        del shape["source"]
        specs[name] = ModelSpec(name=name, **shape)
    return MappingProxyType(specs)


def shape_of(name: str) -> ModelSpec | None:
    """Return the known model of that name, or the one that a variant is named after.

    Pruned and tuned models keep the shape of the one they were made of and name it first:
    `llama-2-7b-wanda` has the shape of llama-2-7b.
    """
    known = known_models()
    bases = [known_name for known_name in known if name == known_name or name.startswith(f"{known_name}-")]
    return known[max(bases, key=len)] if bases else None


def load_model(name_or_path: str) -> ModelSpec:
    """Return a model by its catalogue name, or read it from a Hugging Face configuration.

    A model that is read is called by the last part of the configuration's `_name_or_path`, else
    by its folder.

    Args:
        name_or_path: a name of `known_models`, or the path of a `config.json` or of its folder.

    Raises:
        UnknownNameError: neither a known name nor a path.
        InputError: the file is missing, is not JSON, or does not describe a decoder-only model.
    """
    known = known_models()
    if name_or_path in known:
        return known[name_or_path]
    path = Path(name_or_path)
    if not (path.suffix == ".json" or os.sep in name_or_path or exists(path)):
        hint = "or give the path of a Hugging Face config.json"
        raise UnknownNameError("model", name_or_path, known, hint)
    return _read_config(path / "config.json" if is_folder(path) else path)


def _read_config(path: Path) -> ModelSpec:
    where = f"model configuration {str(path)!r}"
    text = read_text(path, what="model configuration")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{where} must hold a JSON object, not {type(config).__name__}")
    return model_from_hf_config(config, name=_name_of(config, path), where=where)


def _name_of(config: Mapping[str, Any], path: Path) -> str:
    origin = config.get("_name_or_path")
    # A model saved from a local folder says "." or "./" there, which names nothing.
    last = PurePosixPath(origin).name if isinstance(origin, str) else ""
    return last or path.resolve().parent.name
