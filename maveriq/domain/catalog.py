"""The models maveriq knows by name, and models read from a Hugging Face `config.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import msgspec

from maveriq.domain.models import ModelSpec, model_from_hf_config
from maveriq.embedded import data_path
from maveriq.errors import InputError, UnknownNameError
from maveriq.tables import exists, is_folder, read_text, read_toml


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
