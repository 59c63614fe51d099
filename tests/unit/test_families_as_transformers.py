"""What a family implies is what transformers builds of it: small models of families whose files are not at hand."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from maveriq.domain.decoder_config import read_decoder

SMALL: Mapping[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "intermediate_size": 768, "vocab_size": 1000, "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
EXPERTS: Mapping[str, Any] = {"num_experts": 8, "moe_topk": 2}

# Each by the keys that make it differ from a llama. Shares of a thousandth stand for vectors as wide as a layer.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "cohere": {"use_qk_norm": True},
    "cohere2": {"head_dim": 32},
    "deepseek_v2": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 2,
        "first_k_dense_replace": 1, "kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16, "v_head_dim": 32, "num_key_value_heads": 8, "mlp_bias": True, "n_group": 1,
        "topk_group": 1,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1, "use_bias": True,
    },
    "exaone4": {"sliding_window": 64},
    "gemma": {"head_dim": 64},
    "gemma2": {"head_dim": 64},
    "glm4": {"head_dim": 32},
    "granite": {},
    "hunyuan_v1_moe": {**EXPERTS, "head_dim": 32, "use_qk_norm": True},
    "hyperclovax": {},
    "nemotron_h": {
        "head_dim": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1,
        "topk_group": 1, "moe_shared_expert_intermediate_size": 96, "use_bias": True,
    },
    "olmo2": {},
    "phi": {"qk_layernorm": True},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "seed_oss": {"head_dim": 64},
    "smollm3": {},
    "stablelm": {"qk_layernorm": True, "use_parallel_residual": True},
    "starcoder2": {},
}  # fmt: skip


@pytest.mark.heavy
@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_model_has_as_many_parameters_as_transformers_builds(family: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    given = {**SMALL, **FAMILIES[family]}
    if family == "nemotron_h":
        del given["num_hidden_layers"]  # its list of layers says it
    config = transformers.AutoConfig.for_model(family, **given)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    built = sum(parameter.numel() for parameter in model.parameters())
    written = json.loads(json.dumps(config.to_dict(), default=str))
    assert read_decoder(written, "config.json").decoder.parameters() == pytest.approx(built, rel=1e-4)
