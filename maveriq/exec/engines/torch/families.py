"""The families that the torch engine runs on transformers' modules, without torch and transformers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_SHARDED = (
    "arcee", "codegen", "cohere", "cohere2", "dots1", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3", "glm",
    "glm4", "glm4_moe", "gpt_neox", "granite", "granitemoe", "minimax_m2", "mistral", "mixtral", "nemotron",
    "nemotron_h", "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_5",
    "qwen3_5_moe", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip
_WHOLE = ("bloom", "gpt2", "gpt_bigcode", "opt", "stablelm")

TRANSFORMERS_FAMILIES: Mapping[str, bool] = MappingProxyType(
    {**dict.fromkeys(_SHARDED, True), **dict.fromkeys(_WHOLE, False)}
)
"""Families by name, and whether transformers has a plan to shard them that gives the tokens of the unsplit model.

Each is one whose tokens are tested (tests/exec/test_torch_transformers.py).
"""

BEYOND_OWN_DECODER: Mapping[str, bool] = MappingProxyType({"llama": True, "gptj": True, "falcon": False})
"""The same of the families of maveriq's own decoder: what it does not cover of them runs on transformers' modules."""

EXPANDS_KV_HEADS = frozenset({"falcon"})
"""Families of which transformers keeps several KV heads once for each query head: many times the estimated memory."""


def has_plan(family: str) -> bool:
    """Return whether transformers can shard a family."""
    return {**TRANSFORMERS_FAMILIES, **BEYOND_OWN_DECODER}[family]
