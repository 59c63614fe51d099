"""Further published models, typed from their cards: read right, or refused by what is not modelled."""

import json
from typing import Any

import pytest

from maveriq.domain.decoder_config import read_decoder
from maveriq.errors import InputError


def dense(
    family: str, layers: int, hidden: int, heads: int, kv_heads: int, width: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": family, "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": width, "vocab_size": vocabulary,
        "max_position_embeddings": 131072, "tie_word_embeddings": False, **more,
    }  # fmt: skip


LATENT = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}


def shared(experts: int, active: int, width: int, number: int, first: int) -> dict[str, int]:
    return {
        "n_routed_experts": experts, "num_experts_per_tok": active, "moe_intermediate_size": width,
        "n_shared_experts": number, "first_k_dense_replace": first,
    }  # fmt: skip


NEMOTRON_H_8B = {
    **dense("nemotron_h", 52, 4096, 32, 8, 21504, 131072), "attention_head_dim": 128, "mamba_num_heads": 128,
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", "mamba_head_dim": 64,
    "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4,
}  # fmt: skip
GEMMA_3_4B = {
    "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "head_dim": 256, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "image_size": 896, "num_hidden_layers": 27, "patch_size": 14},
}  # fmt: skip

# Configuration, billions of parameters as the card or the files say, KV bytes a token in 16 bits by hand.
READ: dict[str, tuple[dict[str, Any], float, int]] = {
    "Qwen3-Next-80B-A3B": (
        dense("qwen3_next", 48, 2048, 16, 2, 5120, 151936, head_dim=256, num_experts=512, num_experts_per_tok=10,
              moe_intermediate_size=512, shared_expert_intermediate_size=512, linear_num_key_heads=16,
              linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128, linear_conv_kernel_dim=4),
        79.7, 2 * 12 * 2 * 256 * 2,
    ),
    "GLM-4.5": (
        dense("glm4_moe", 92, 5120, 96, 8, 12288, 151552, head_dim=128, use_qk_norm=True, attention_bias=True,
              **shared(160, 8, 1536, 1, 3)),
        353.0, 2 * 92 * 8 * 128 * 2,
    ),
    "GLM-4.5-Air": (
        dense("glm4_moe", 46, 4096, 96, 8, 10944, 151552, head_dim=128, attention_bias=True,
              **shared(128, 8, 1408, 1, 1)),
        106.0, 2 * 46 * 8 * 128 * 2,
    ),
    "Kimi-K2": (
        dense("kimi_k2", 61, 7168, 64, 64, 18432, 163840, **LATENT, **shared(384, 8, 2048, 1, 1)),
        1026.4, 61 * 576 * 2,
    ),
    "DeepSeek-V2": (
        dense("deepseek_v2", 60, 5120, 128, 128, 12288, 102400, **LATENT, **shared(160, 6, 1536, 2, 1)),
        236.0, 60 * 576 * 2,
    ),
    "Command-R+": (
        dense("cohere", 64, 12288, 96, 8, 33792, 256000, tie_word_embeddings=True), 103.8, 2 * 64 * 8 * 128 * 2,
    ),
    "OLMo-2-13B": (dense("olmo2", 40, 5120, 40, 40, 13824, 100352), 13.7, 2 * 40 * 40 * 128 * 2),
    "ERNIE-4.5-21B-A3B": (
        dense("ernie4_5_moe", 28, 2560, 20, 4, 12288, 103424, tie_word_embeddings=True, moe_num_experts=64, moe_k=6,
              moe_intermediate_size=1536, moe_num_shared_experts=2, moe_layer_start_index=1, moe_layer_end_index=27),
        21.8, 2 * 28 * 4 * 128 * 2,
    ),
    "Seed-OSS-36B": (dense("seed_oss", 64, 5120, 80, 8, 27648, 155136, head_dim=128), 36.15, 2 * 64 * 8 * 128 * 2),
    "Ling-lite": (
        dense("bailing_moe", 28, 2048, 16, 4, 5632, 126464, num_experts=64, num_experts_per_tok=6,
              moe_intermediate_size=1408, num_shared_experts=2, first_k_dense_replace=0),
        16.8, 2 * 28 * 4 * 128 * 2,
    ),
    "Granite-3.1-8B": (
        dense("granite", 40, 4096, 32, 8, 12800, 49155, tie_word_embeddings=True), 8.17, 2 * 40 * 8 * 128 * 2,
    ),
    "Nemotron-H-8B": (NEMOTRON_H_8B, 8.1, 2 * 4 * 8 * 128 * 2),
    "Gemma-3-4b (decoder)": (GEMMA_3_4B, 3.88, 2 * 34 * 4 * 256 * 2),
    "Mistral-Small-3.1-24B (decoder)": (
        {"model_type": "mistral3", "text_config": dense("mistral", 40, 5120, 32, 8, 32768, 131072, head_dim=128,
                                                        sliding_window=None),
         "vision_config": {"model_type": "pixtral", "hidden_size": 1024}},
        23.57, 2 * 40 * 8 * 128 * 2,
    ),
    "Qwen2.5-VL-7B (decoder)": (
        dense("qwen2_5_vl", 28, 3584, 28, 4, 18944, 152064, use_sliding_window=False, max_window_layers=28,
              sliding_window=32768, rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
              vision_config={"depth": 32, "hidden_size": 1280}),
        7.62, 2 * 28 * 4 * 128 * 2,
    ),
    "SmolLM3-3B": (
        dense("smollm3", 36, 2048, 16, 4, 11008, 128256, tie_word_embeddings=True), 3.08, 2 * 36 * 4 * 128 * 2,
    ),
    "Pythia-12B": (dense("gpt_neox", 36, 5120, 40, 40, 20480, 50688), 11.85, 2 * 36 * 40 * 128 * 2),
    "StarCoder2-7B": (
        dense("starcoder2", 32, 4608, 36, 4, 18432, 49152, tie_word_embeddings=True, sliding_window=4096),
        7.17, 2 * 32 * 4 * 128 * 2,
    ),
    "DBRX": (
        {"model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40, "vocab_size": 100352,
         "max_seq_len": 32768, "tie_word_embeddings": False, "attn_config": {"kv_n_heads": 8},
         "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4}},
        131.6, 2 * 40 * 8 * 128 * 2,
    ),
}  # fmt: skip

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Falcon-H1": (dense("falcon_h1", 36, 3072, 12, 2, 12288, 65536), "falcon_h1 has state-space"),
    "Granite-4-H": (dense("granitemoehybrid", 40, 4096, 32, 8, 1536, 100352), "granitemoehybrid has state-space"),
    "MiniMax-M1": (
        dense("minimax_m1", 80, 6144, 64, 8, 9216, 200064, hidden_act="silu", attn_type_list=[0] * 7 + [1],
              num_local_experts=32, num_experts_per_tok=2),
        "linear attention (attn_type_list)",
    ),
    "Kimi-Linear": (dense("kimi_linear", 27, 2304, 32, 32, 9216, 163840), "kimi_linear has state-space or recurrent"),
    "Hunyuan-A13B": (
        dense("hunyuan_v1_moe", 32, 4096, 32, 8, 3072, 128167, num_experts=64, moe_topk=[8] * 32,
              use_mixed_mlp_moe=True),
        "experts of this kind (use_mixed_mlp_moe)",
    ),
    "Gemma-3n": (
        {"model_type": "gemma3n", "text_config": {"model_type": "gemma3n_text", "num_kv_shared_layers": 10,
                                                  "hidden_size_per_layer_input": 256}},
        "a KV cache shared by layers (num_kv_shared_layers)",
    ),
    "LongCat-Flash": (
        dense("longcat_flash", 28, 6144, 64, 64, 12288, 131072, hidden_act="silu", zero_expert_num=256),
        "experts of this kind (zero_expert_num)",
    ),
    "Jamba": (dense("jamba", 32, 4096, 32, 8, 14336, 65536), "jamba has state-space"),
    "BERT": (dense("bert", 12, 768, 12, 12, 3072, 30522), "bert is an encoder"),
    "T5": ({"model_type": "t5", "d_model": 512}, "t5 is an encoder-decoder"),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_further_models_are_read_right(name: str) -> None:
    config, billions, kv_bytes = READ[name]
    decoder = read_decoder(json.loads(json.dumps(config)), "config.json").decoder
    assert decoder.text_parameters() / 1e9 == pytest.approx(billions, rel=0.01)
    assert decoder.kv_bytes_per_token() == kv_bytes


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_modelled_is_named(name: str) -> None:
    config, words = REFUSED[name]
    with pytest.raises(InputError) as refused:
        read_decoder(json.loads(json.dumps(config)), "config.json")
    assert words in str(refused.value)


def test_positions_that_are_scaled_already() -> None:
    assert read_decoder(GEMMA_3_4B, "config.json").decoder.context_tokens == 131072
