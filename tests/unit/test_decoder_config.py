"""The reader of decoders: experts, latent attention, windows, nesting; counts checked by hand."""

import json
from typing import Any

import pytest

from maveriq.domain.attention import GroupedAttention, LatentAttention
from maveriq.domain.decoder import Decoder, KvCache
from maveriq.domain.decoder_config import read_decoder
from maveriq.domain.feed_forward import ExpertFeedForward
from maveriq.domain.models import ModelSpec, WeightType, model_from_hf_config
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.estimate.hardware_profile import load_profile
from maveriq.estimate.registry import make_estimator
from maveriq.exec.capabilities import Device, unsupported_by
from maveriq.exec.model_files import hf_config_json

SMALL = {
    "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2,
    "intermediate_size": 100, "vocab_size": 1000, "max_position_embeddings": 256, "hidden_act": "silu",
    "tie_word_embeddings": False, "head_dim": 8,
}  # fmt: skip
MIXTRAL = {**SMALL, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN_MOE = {
    **SMALL, "model_type": "qwen3_moe", "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 24,
    "head_dim": 16,
}  # fmt: skip
DEEPSEEK = {
    **SMALL, "model_type": "deepseek_v3", "kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 16, "n_shared_experts": 2, "num_experts_per_tok": 4,
    "moe_intermediate_size": 24, "first_k_dense_replace": 1,
}  # fmt: skip
MISTRAL = {**SMALL, "model_type": "mistral", "sliding_window": 32}


def read(config: dict[str, Any]) -> Decoder:
    return read_decoder(json.loads(json.dumps(config)), "config.json").decoder


def model(config: dict[str, Any]) -> ModelSpec:
    return model_from_hf_config(json.dumps(config), name="mine", where="config.json")


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def attention(hidden: int = 64, heads: int = 8, kv_heads: int = 2, size: int = 8) -> int:
    return 2 * hidden * heads * size + 2 * hidden * kv_heads * size


def around(layers: int, hidden: int = 64, vocabulary: int = 1000) -> int:
    """Embedding, output, last norm, and two norms a layer."""
    return 2 * vocabulary * hidden + hidden + 2 * layers * hidden


def test_experts_as_wide_as_the_file_says() -> None:
    decoder = read(MIXTRAL)
    expert = 3 * 64 * 100
    layer = attention() + 8 * expert + 64 * 8
    assert decoder.parameters() == around(4) + 4 * layer
    assert decoder.active_parameters() == around(4) + 4 * (layer - 6 * expert)
    assert decoder.features() == ("8 experts in 4 layers",)
    assert decoder.layers_parameters(1, 3) == 2 * (layer + 2 * 64)


def test_experts_with_a_width_of_their_own_and_norms_of_queries_and_keys() -> None:
    layer = attention(size=16) + 2 * 16 + 16 * 3 * 64 * 24 + 64 * 16
    assert read(QWEN_MOE).parameters() == around(4) + 4 * layer


@pytest.mark.parametrize(
    ("more", "sparse"),
    [
        ({"decoder_sparse_step": 2}, [0, 1, 0, 1]),
        ({"mlp_only_layers": [0, 3]}, [0, 1, 1, 0]),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, [0, 0, 0, 1]),
        ({"first_k_dense_replace": 3}, [0, 0, 0, 1]),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, [0, 0, 1, 0]),
        ({"moe_layer_freq": [0, 1, 1, 0]}, [0, 1, 1, 0]),
        ({"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}, [0, 1, 0, 1]),
        ({"interleave_moe_layer_step": 2}, [0, 1, 0, 1]),
        ({"moe_layers_enum": "1,2"}, [0, 1, 1, 0]),
        ({"moe_layers": [2]}, [0, 0, 1, 0]),
    ],
)
def test_which_layers_have_experts(more: dict[str, Any], sparse: list[int]) -> None:
    decoder = read({**QWEN_MOE, **more})
    kinds = [decoder.layer_kinds[index].feed_forward for index in decoder.layer_pattern]
    assert [int(isinstance(kind, ExpertFeedForward)) for kind in kinds] == sparse


def test_latent_attention_and_shared_experts() -> None:
    decoder = read(DEEPSEEK)
    latent = 64 * 48 + 48 + 48 * 8 * 24 + 64 * 40 + 32 + 32 * 8 * 28 + 8 * 12 * 64
    dense, sparse = 3 * 64 * 100, 16 * 3 * 64 * 24 + 2 * 3 * 64 * 24 + 64 * 16 + 16
    assert decoder.parameters() == around(4) + 4 * latent + dense + 3 * sparse
    assert decoder.active_parameters() == decoder.parameters() - 3 * 12 * 3 * 64 * 24
    assert decoder.kv_bytes_per_token() == 4 * (32 + 8) * 2
    assert decoder.kv_bytes_per_token(1) == 4 * (32 + 8)
    assert isinstance(decoder.layer_kinds[0].attention, LatentAttention)
    direct = read({**DEEPSEEK, "q_lora_rank": None})
    assert decoder.parameters() - direct.parameters() == 4 * (64 * 48 + 48 + 48 * 8 * 24 - 64 * 8 * 24)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (MISTRAL, [32] * 4),
        ({**MISTRAL, "sliding_window": None}, [None] * 4),
        ({**without(MISTRAL, "sliding_window"), "max_position_embeddings": 8192}, [4096] * 4),
        ({**MISTRAL, "sliding_window": 256}, [None] * 4),
        ({**MISTRAL, "model_type": "qwen2", "use_sliding_window": False, "max_window_layers": 2}, [None] * 4),
        ({**MISTRAL, "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3}, [None] * 3 + [32]),
        ({**MISTRAL, "model_type": "gemma2"}, [32, None] * 2),
        ({**MISTRAL, "model_type": "gemma3_text", "sliding_window_pattern": 3}, [32, 32, None, 32]),
        ({**MISTRAL, "model_type": "cohere2"}, [32, 32, 32, None]),
        ({**MISTRAL, "model_type": "exaone4", "sliding_window_pattern": "LLG"}, [32, 32, None, 32]),
        ({**MISTRAL, "model_type": "llama", "layer_types": ["sliding_attention", "full_attention"] * 2},
         [32, None] * 2),
    ],
)  # fmt: skip
def test_which_layers_have_a_window(config: dict[str, Any], windows: list[int | None]) -> None:
    decoder = read(config)
    found = [decoder.layer_kinds[index].attention for index in decoder.layer_pattern]
    assert [isinstance(part, GroupedAttention) and part.window for part in found] == windows


def test_layers_with_a_window_keep_no_more_than_it() -> None:
    cache = read({**MISTRAL, "model_type": "gemma2"}).kv_cache()
    layer = 2 * 2 * 8 * 2
    assert cache == KvCache(full_bytes=2 * layer, windowed=((32, 2 * layer),))
    assert cache.token_bytes == 4 * layer
    assert cache.sequence_bytes(20) == 20 * 4 * layer
    assert cache.sequence_bytes(100) == 100 * 2 * layer + 32 * 2 * layer


def test_the_decoder_of_a_multimodal_model_is_read_and_the_rest_is_named() -> None:
    nested = {
        "model_type": "qwen3_vl_moe", "tie_word_embeddings": False, "vision_config": {"depth": 2},
        "text_config": {**without(QWEN_MOE, "tie_word_embeddings"), "model_type": "qwen3_vl_moe_text"},
    }  # fmt: skip
    decoder = read(nested)
    assert decoder.text_parameters() == read(QWEN_MOE).parameters()
    assert decoder.not_counted == ("the parts for other inputs (vision_config)",)
    with pytest.raises(InputError, match=r"tie_word_embeddings is True, but text_config.tie_word_embeddings is False"):
        read({**nested, "tie_word_embeddings": True, "text_config": QWEN_MOE})


def test_delta_nets_keep_a_state_and_no_tokens() -> None:
    config = {
        **QWEN_MOE, "model_type": "qwen3_next", "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 24,
    }  # fmt: skip
    decoder = read(config)
    mixed, values = 2 * 2 * 8 + 4 * 16, 4 * 16
    net = 64 * (mixed + values + 4 + 4) + values * 64 + mixed * 4 + 4 + 4 + 16
    full = attention(size=16) + 64 * 8 * 16 + 2 * 16  # the output's gate doubles the queries
    experts = 16 * 3 * 64 * 24 + 3 * 64 * 24 + 64 + 64 * 16
    assert decoder.parameters() == around(4) + 3 * net + full + 4 * experts
    cache = decoder.kv_cache()
    assert cache.full_bytes == 2 * 2 * 16 * 2, "one layer in four keeps tokens"
    assert cache.state_bytes == 3 * (mixed * 3 * 2 + 4 * 8 * 16 * 4)
    assert "gated delta-net layers" in decoder.features()
    assert [kind.attention for kind, _ in read({**config, "full_attention_interval": 2}).kinds()] != []


def test_layers_of_one_part_each() -> None:
    config = {
        **SMALL, "model_type": "nemotron_h", "num_hidden_layers": 5, "hybrid_override_pattern": "ME*-M",
        "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8, "conv_kernel": 4,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 48, "moe_latent_size": 32,
    }  # fmt: skip
    decoder = read(config)
    inner, mixed = 64, 64 + 2 * 2 * 8
    mamba = 64 * (inner + mixed + 4) + inner * 64 + mixed * 5 + 3 * 4 + inner
    experts = 8 * 2 * 32 * 24 + 2 * 64 * 48 + 2 * 64 * 32 + 64 * 8 + 8
    parts = 2 * mamba + experts + attention() + 2 * 64 * 100
    assert decoder.parameters() == 2 * 1000 * 64 + 64 + 5 * 64 + parts
    assert decoder.kv_cache().full_bytes == 2 * 2 * 8 * 2
    assert decoder.kv_cache().state_bytes == 2 * (mixed * 3 * 2 + inner * 8 * 4)
    types = ["mamba", "moe", "attention", "mlp", "mamba"]
    assert read({**without(config, "hybrid_override_pattern"), "layers_block_type": types}) == decoder
    assert model(config).attention_heads == 8
    for wrong, words in (
        ({"num_hidden_layers": 6}, "num_hidden_layers is 6, but the pattern of layers has 5"),
        ({"hybrid_override_pattern": "MEX"}, "must say M, *, E or - for every layer"),
        (
            {"layers_block_type": ["odd"] * 5},
            "'odd' is none of mamba, linear_attention, attention, full_attention, moe, mlp",
        ),
    ):
        with pytest.raises(InputError) as refused:
            read({**config, **wrong})
        assert words in str(refused.value)


def test_an_indexer_caches_a_key_of_its_own() -> None:
    config = {**DEEPSEEK, "model_type": "deepseek_v32", "index_n_heads": 4, "index_head_dim": 128, "index_topk": 64}
    decoder, plain = read(config), read(DEEPSEEK)
    assert decoder.parameters() - plain.parameters() == 4 * (48 * 4 * 128 + 64 * 128 + 64 * 4 + 2 * 128)
    assert decoder.kv_bytes_per_token() - plain.kv_bytes_per_token() == 4 * (128 + 4)
    assert decoder.kv_bytes_per_token(1) - plain.kv_bytes_per_token(1) == 4 * (128 + 4)
    shared = read({**config, "indexer_types": ["full", "shared", "shared", "full"]})
    assert shared.kv_bytes_per_token() - plain.kv_bytes_per_token() == 2 * (128 + 4)


def test_layers_with_full_attention_may_have_other_heads() -> None:
    config = {
        **SMALL, "model_type": "gemma4_text", "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1,
        "attention_k_eq_v": True, "sliding_window": 32, "num_hidden_layers": 6, "enable_moe_block": True,
        "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 24, "tie_word_embeddings": True,
    }  # fmt: skip
    decoder = read(config)
    windowed, full = attention() + 2 * 8, 2 * 64 * 8 * 16 + 64 * 16 + 2 * 16
    experts = 8 * 3 * 64 * 24 + 64 * 8 + 8 + 64 + 3 * 64
    layers = 5 * windowed + full + 6 * (3 * 64 * 100 + experts + 4 * 64)
    assert decoder.parameters() == 1000 * 64 + 64 + layers
    assert decoder.kv_cache() == KvCache(full_bytes=2 * 16 * 2, windowed=((32, 5 * 2 * 2 * 8 * 2),))
    assert read({**config, "enable_moe_block": False}).active_parameters() < decoder.active_parameters()


def test_further_layers_are_named() -> None:
    assert read({**DEEPSEEK, "num_nextn_predict_layers": 1}).not_counted == (
        "layers that predict further tokens (num_nextn_predict_layers 1)",
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (without(MIXTRAL, "num_local_experts"), "mixtral has experts, but no num_local_experts"),
        ({**MIXTRAL, "num_local_experts": 0}, "mixtral has experts, but no num_local_experts"),
        ({**MIXTRAL, "num_local_experts": "8"}, "num_local_experts must be a whole number, 0 or more, not '8'"),
        (without(MIXTRAL, "num_experts_per_tok"), "no num_experts_per_tok"),
        ({**MIXTRAL, "num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than the 8 experts"),
        (without(MIXTRAL, "num_key_value_heads"), "no num_key_value_heads"),
        (without(QWEN_MOE, "moe_intermediate_size"), "no moe_intermediate_size"),
        ({**QWEN_MOE, "mlp_only_layers": [4]}, "mlp_only_layers names layer 4, but there are 4 layers"),
        ({**QWEN_MOE, "moe_layer_freq": [0, 1]}, "moe_layer_freq must have 4 entries"),
        ({**QWEN_MOE, "moe_layer_freq": [0, 1, 2, 0]}, "moe_layer_freq: 2 is neither 0 nor 1"),
        ({**QWEN_MOE, "mlp_layer_types": ["dense"] * 3 + ["odd"]}, "'odd' is neither dense nor sparse"),
        (without(DEEPSEEK, "n_shared_experts"), "no n_shared_experts, which files of deepseek_v3 have"),
        (without(DEEPSEEK, "first_k_dense_replace"), "no first_k_dense_replace"),
        (without(QWEN_MOE, "head_dim"), "no head_dim, which files of qwen3_moe have"),
        (without(DEEPSEEK, "q_lora_rank"), "no q_lora_rank"),
        (without(DEEPSEEK, "kv_lora_rank"), "no kv_lora_rank"),
        ({**DEEPSEEK, "v_head_dim": 0}, "v_head_dim must be a positive whole number"),
        ({**MISTRAL, "model_type": "mystery"}, "a sliding window (sliding_window 32) in a family without one"),
        ({**SMALL, "model_type": "mystery", "hidden_act": "gelu"}, "model_type mystery is not known"),
        ({**MISTRAL, "tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({**DEEPSEEK, "index_topk": 64}, "sparse attention by an indexer (index_topk)"),
        ({**QWEN_MOE, "moe_latent_size": 16}, "experts of this kind (moe_latent_size)"),
    ],
)  # fmt: skip
def test_what_does_not_add_up_is_refused_by_name(config: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as refused:
        read(config)
    assert words in str(refused.value)
    assert str(refused.value).startswith("config.json: ")


@pytest.mark.parametrize("config", [MIXTRAL, DEEPSEEK, MISTRAL], ids=["experts", "latent", "window"])
def test_who_knows_plain_decoders_alone_refuses_others(config: dict[str, Any]) -> None:
    spec = model({**config, "_name_or_path": "llama-2-7b"})
    configuration = ParallelConfig(tp=1, pp=1, weights=WeightType.FLOAT16)
    what = spec.why_not_plain()
    assert what is not None
    for name in ("calibrated", "paper"):
        reason = make_estimator(name, load_profile("a6000-short")).why_not(spec, configuration)
        assert reason == f"{what}, which this estimator does not model: it knows plain decoders"
    assert unsupported_by("trtllm-engine", spec, configuration, Device.CUDA) is not None
    with pytest.raises(InputError, match="give its config"):
        hf_config_json(spec)
