"""One field of a configuration damaged at a time: read as before, refused by name, or read as the field then says."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from maveriq.domain.decoder_config import read_decoder
from maveriq.domain.model_config import parse_config
from maveriq.domain.models import catalogue
from maveriq.errors import InputError

_MISSING = object()
DAMAGES: Mapping[str, Any] = {
    "removed": _MISSING, "null": None, "zero": 0, "negative": -1, "text": "x", "huge": 10**18, "list": [],
    "object": {}, "fraction": 2.5, "true": True,
}  # fmt: skip

# Damage after which another number is right: the field has a meaning where it is absent or off, and engines read it so.
# Everything else must be refused, or change nothing.
MEANT: Mapping[str, set[str]] = {
    # Without them there are no windows, no scaling of positions, no experts' extras; or the family's rule counts.
    "sliding_window": {"removed", "null", "negative"},
    "attention_chunk_size": {"removed", "null", "negative"},
    "first_k_dense_replace": {"zero"},
    "n_shared_experts": {"zero"},
    "shared_expert_intermediate_size": {"zero"},
    "moe_shared_expert_intermediate_size": {"zero"},
    "share_expert_dim": {"zero"},
    "moe_latent_size": {"removed", "null"},
    "q_lora_rank": {"null"},
    "num_global_key_value_heads": {"removed", "null"},
    "use_qk_norm": {"removed", "null"},
    # A switch that is turned on.
    "bias": {"true"},
    "attention_bias": {"true"},
    "tie_word_embeddings": {"removed", "null", "true"},
    "new_decoder_architecture": {"removed", "null", "true"},
    "multi_query": {"true"},
    "mamba_proj_bias": {"true"},
    "use_bias": {"true"},
    "mlp_bias": {"true"},
    # Without a number of its own a head is as large as the hidden size allows; without KV heads each head has one.
    "head_dim": {"removed", "null"},
    "num_key_value_heads": {"removed", "null"},
    # The family comes from `architectures` then, or is not known and read as a llama with a note.
    "model_type": {"removed", "null", "text"},
    # Learned positions are noted as not counted then.
    "max_position_embeddings": {"removed", "null"},
    # Weights that are not quantised, or quantised without exceptions or blocks.
    "quantization_config": {"removed", "null"},
    "ignore": {"removed", "null", "list"},
    "exclude_modules": {"removed", "null", "list"},
    "modules_to_not_convert": {"removed", "null", "list"},
    "weight_block_size": {"removed", "null"},
    "strategy": {"removed", "null", "text"},
    "type": {"removed"},
    "scale_fmt": {"removed", "null", "text"},
    "vision_config": {"removed", "null", "object"},
    # Keys by which the layout of a vision tower is recognised: it is named as not counted then.
    "deepstack_visual_indexes": {"removed", "null", "list"},
    "position_embedding_size": {"removed", "null"},
    "pixel_shuffle_ratio": {"removed", "null"},
    "vt_hidden_size": {"removed", "null"},
}  # fmt: skip


def keys_of(config: Mapping[str, Any], within: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        yield (*within, key)
        if isinstance(value, dict) and len(value) < 60:
            yield from keys_of(value, (*within, key))


def damaged(config: Mapping[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    found = dict(config)
    inner = found
    for key in path[:-1]:
        inner[key] = dict(inner[key])
        inner = inner[key]
    if value is _MISSING:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return found


def numbers(config: Mapping[str, Any]) -> tuple[object, ...] | None:
    """All that is counted of a configuration; None if it is refused by name."""
    refusal = ""
    try:
        read = read_decoder(config, "config.json")
    except InputError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith("config.json: ")
        assert "\n" not in refusal
        return None
    decoder = read.decoder
    cache, weights = decoder.kv_cache(), decoder.weight_bytes()
    return decoder.parameters(), decoder.active_parameters(), cache, weights, read.quantization


def wrong_numbers(config: Mapping[str, Any]) -> list[str]:
    as_published = numbers(config)
    assert as_published is not None
    wrong = []
    for path in keys_of(config):
        for damage, value in DAMAGES.items():
            found = numbers(damaged(config, path, value))
            if found not in (None, as_published) and damage not in MEANT.get(path[-1], ()):
                wrong.append(f"{'.'.join(path)} {damage}")
    return wrong


FAMILIES = {entry.config["model_type"]: name for name, entry in catalogue().items()}


@pytest.mark.parametrize("name", FAMILIES.values())
def test_no_damaged_field_of_the_catalogue_gives_a_wrong_number(name: str) -> None:
    assert wrong_numbers(catalogue()[name].config) == []


@pytest.mark.parametrize("name", FAMILIES.values())
def test_a_doubled_count_changes_what_it_counts_or_is_refused(name: str) -> None:
    config = catalogue()[name].config
    as_published = numbers(config)
    counted = {
        "num_hidden_layers", "n_layer", "hidden_size", "n_embd", "vocab_size", "intermediate_size", "ffn_dim",
        "num_key_value_heads", "num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok",
        "moe_intermediate_size", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    }  # fmt: skip
    doubled = [path for path in keys_of(config) if path[-1] in counted]
    assert doubled
    for path in doubled:
        found = numbers(damaged(config, path, 2 * config[path[0]]))
        unused = {"intermediate_size"} if "moe_intermediate_size" in config else set()
        unused |= {"num_key_value_heads"} if "kv_lora_rank" in config else set()
        assert found is None or found != as_published or path[-1] in unused, path


@pytest.mark.heavy
@pytest.mark.skipif("MAVERIQ_DATA" not in os.environ, reason="MAVERIQ_DATA has the configurations")
def test_no_damaged_field_of_published_configurations_gives_a_wrong_number() -> None:
    folder = Path(os.environ["MAVERIQ_DATA"]) / "models"
    seen: set[object] = set()
    wrong: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*/config.json")):
        config = parse_config(path.read_text(encoding="utf-8"), "config.json")
        shape = (config.get("model_type"), tuple(sorted(config)), path.stat().st_size > 100_000)
        if shape in seen or shape[2] or numbers(config) is None:
            continue
        seen.add(shape)
        wrong[path.parent.name] = wrong_numbers(config)
    assert len(wrong) > 20
    assert {name: fields for name, fields in wrong.items() if fields} == {}
