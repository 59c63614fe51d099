"""The reader of config.json: which shapes it reads, and what it refuses by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from maveriq.domain.models import ModelSpec, known_models, load_model, model_from_hf_config
from maveriq.errors import InputError
from maveriq.estimate.calibration_file import kv_bytes, layer_parameters
from maveriq.exec.model_files import hf_config_json

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 172,
    "vocab_size": 1000,
    "max_position_embeddings": 256,
}
GPT = {"n_layer": 2, "n_embd": 64, "n_head": 8, "vocab_size": 10}


def read(config: object) -> ModelSpec:
    text = config if isinstance(config, str) else json.dumps(config)
    return model_from_hf_config(text, name="mine", where="config.json")


def compressed(activations: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"model_type": "bloom", "n_embed": 64, "n_layer": 2, "num_attention_heads": 4, "vocab_size": 9},
         {"layers": 2, "hidden_size": 64, "intermediate_size": 256, "feed_forward_matrices": 2, "kv_heads": 4}),
        ({"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 3, "vocab_size": 9,
          "max_seq_len": 99},
         {"attention_heads": 4, "layers": 2, "intermediate_size": 192, "feed_forward_matrices": 2,
          "context_tokens": 99}),
        ({"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 9,
          "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2}},
         {"kv_heads": 2, "intermediate_size": 256}),
        ({"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 9,
          "attn_config": {"attn_type": "multiquery_attention"}}, {"kv_heads": 1}),
        ({"model_type": "opt", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96,
          "vocab_size": 9}, {"intermediate_size": 96, "feed_forward_matrices": 2, "all_reduces_per_layer": 2}),
        ({"model_type": "gpt2", **GPT, "n_inner": None, "n_positions": 128},
         {"intermediate_size": 256, "feed_forward_matrices": 2, "kv_heads": 8, "context_tokens": 128}),
        ({"model_type": "gpt_bigcode", **GPT, "multi_query": True}, {"kv_heads": 1, "feed_forward_matrices": 2}),
        ({"model_type": "gpt_neox", **without(LLAMA, "model_type")},
         {"feed_forward_matrices": 2, "all_reduces_per_layer": 1}),
        ({"model_type": "gpt_neox", **without(LLAMA, "model_type"), "use_parallel_residual": False},
         {"all_reduces_per_layer": 2}),
        ({"model_type": "falcon", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 9},
         {"kv_heads": 1, "all_reduces_per_layer": 1, "feed_forward_matrices": 2}),
        ({"model_type": "RefinedWebModel", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 9,
          "multi_query": True, "parallel_attn": True},
         {"architecture": "falcon", "kv_heads": 1, "all_reduces_per_layer": 1, "feed_forward_matrices": 2}),
        ({"model_type": "RefinedWeb", "hidden_size": 64, "n_layer": 2, "n_head": 4, "n_head_kv": 2, "vocab_size": 9},
         {"architecture": "falcon", "kv_heads": 2, "all_reduces_per_layer": 1}),
        ({"model_type": "falcon", **GPT, "parallel_attn": False, "multi_query": False},
         {"kv_heads": 8, "all_reduces_per_layer": 2}),
        ({"model_type": "chatglm", "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "kv_channels": 32,
          "multi_query_attention": True, "multi_query_group_num": 2, "ffn_hidden_size": 100, "padded_vocab_size": 9,
          "seq_length": 77}, {"kv_heads": 2, "head_size": 32, "intermediate_size": 100, "context_tokens": 77}),
        ({**LLAMA, "model_type": "qwen", "intermediate_size": 200}, {"intermediate_size": 100}),
        ({**LLAMA, "head_dim": 16}, {"head_size": 16}),
        ({**LLAMA, "num_local_experts": 1, "num_experts_per_tok": 1}, {"layers": 4}),
        ({**LLAMA, "sliding_window": None}, {"layers": 4}),
        ({**LLAMA, "sliding_window": 16, "use_sliding_window": False}, {"layers": 4}),
        ({**LLAMA, "sliding_window": 256}, {"layers": 4}),
        ({**LLAMA, "sliding_window": 16, "layer_types": ["full_attention"] * 4}, {"layers": 4}),
        ({**LLAMA, "vision_config": {"depth": 27}}, {"layers": 4}),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}, {"context_tokens": 512, "rope_type": "linear"}),
        ({**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
         {"context_tokens": 512, "rope_type": "yarn"}),
        ({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, {"context_tokens": 256}),
        (without(LLAMA, "max_position_embeddings"), {"context_tokens": None}),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}}, {"quantization": "int4_gptq"}),
        ({**LLAMA, "quantization_config": {"quant_method": "awq", "w_bit": 4}}, {"quantization": "int4"}),
        ({**LLAMA, "quantization_config": {"quant_method": "fp8"}}, {"quantization": "fp8"}),
        ({**LLAMA, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
         {"quantization": "nf4"}),
        ({**LLAMA, "quantization_config": compressed(num_bits=8, type="float")}, {"quantization": "fp8"}),
        ({**LLAMA, "quantization_config": compressed(num_bits=8, type="int", activations={"num_bits": 8})},
         {"quantization": "int8 with int8 activations"}),
        ({**LLAMA, "quantization_config": compressed(num_bits=4, type="int")}, {"quantization": "int4"}),
        ({**LLAMA, "quantization_config": compressed(num_bits=8, type="int")}, {"quantization": "int8"}),
    ],
)  # fmt: skip
def test_families_and_their_keys(config: dict[str, Any], shape: dict[str, Any]) -> None:
    model = read(config)
    assert {name: getattr(model, name) for name in shape} == shape


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, "experts (num_local_experts) in a family without"),
        ({"num_experts": 64}, "experts (num_experts)"),
        ({"n_routed_experts": 256, "moe_intermediate_size": 2048}, "experts (n_routed_experts)"),
        ({"moe_num_experts": 16}, "experts (moe_num_experts)"),
        ({"moe_intermediate_size": 2048}, "experts (moe_intermediate_size)"),
        ({"ffn_config": {"moe_num_experts": 16, "ffn_hidden_size": 9}}, "experts (moe_num_experts)"),
        ({"kv_lora_rank": 512}, "latent attention (kv_lora_rank)"),
        ({"q_lora_rank": 1536}, "latent attention (q_lora_rank)"),
        ({"sliding_window": 16}, "a sliding window (sliding_window 16)"),
        ({"sliding_window": 16, "use_sliding_window": True}, "a sliding window"),
        ({"attention_chunk_size": 64}, "attention_chunk_size"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must have 4 entries"),
        ({"layer_types": ["sliding_attention"] * 4}, "no sliding_window says how long"),
        ({"layer_types": ["linear_attention"] * 4}, "'linear_attention'"),
        ({"num_kv_shared_layers": 2}, "a KV cache shared by layers (num_kv_shared_layers)"),
        ({"use_cla": True, "cla_share_factor": 2}, "a KV cache shared by layers"),
        ({"block_configs": [{}]}, "layers that differ from each other (block_configs)"),
        ({"num_key_value_heads": [1, 2]}, "num_key_value_heads must be a positive whole number"),
        ({"model_type": "mamba"}, "state-space"),
        ({"model_type": "falcon_mamba"}, "state-space"),
        ({"model_type": "rwkv5"}, "state-space or recurrent"),
        ({"model_type": "jamba"}, "state-space"),
        ({"mamba_d_state": 16}, "state-space or recurrent layers (mamba_d_state)"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "state-space"),
        ({"model_type": "bert"}, "bert is an encoder;"),
        ({"model_type": "xlm-roberta"}, "xlm-roberta is an encoder;"),
        ({"model_type": "t5"}, "t5 is an encoder-decoder"),
        ({"model_type": "whisper"}, "whisper is an encoder-decoder"),
        ({"is_encoder_decoder": True}, "is an encoder-decoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "does not generate text"),
        ({"add_cross_attention": True}, "cross-attention"),
        ({"text_config": {"hidden_size": 9}, "vision_config": {}}, "no text_config.num_hidden_layers"),
        ({"llm_config": {"hidden_size": 9}}, "no llm_config.num_hidden_layers"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "'gptq' with 3 bits"),
        ({"quantization_config": "gptq"}, "quantization_config must be an object"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 must divide the 8 attention heads"),
        ({"num_attention_heads": 6}, "do not divide the hidden size 64; give head_dim"),
        ({"n_embd": 32}, "hidden_size is 64, but n_embd is 32"),
        ({"hidden_size": 64.0}, "hidden_size must be a positive whole number, not 64.0"),
        ({"hidden_size": True}, "hidden_size must be a positive whole number"),
        ({"vocab_size": -5}, "vocab_size must be a positive whole number, not -5"),
        ({"vocab_size": 10**18}, "vocab_size must be at most 100,000,000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10,000"),
        ({"num_hidden_layers": 10**4000}, "num_hidden_layers must be at most 10,000"),
        ({"head_dim": 0}, "head_dim must be a positive whole number"),
        ({"max_position_embeddings": -1}, "max_position_embeddings must be a positive whole number"),
        ({"max_position_embeddings": 1e9}, "max_position_embeddings must be a positive whole number"),
        ({"rope_theta": float("nan")}, "rope_theta must be a finite number"),
        ({"rope_scaling": {"factor": float("inf")}}, "rope_scaling.factor must be a finite number"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor of the rotary positions"),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "differs from layer to layer"),
        ({"model_type": "a\x1b[31m"}, r"model_type must be a name such as llama, not 'a\x1b[31m'"),
        ({"model_type": ["llama"]}, "model_type must be a name"),
        ({"word_embed_proj_dim": 32}, "word_embed_proj_dim 32"),
    ],
)  # fmt: skip
def test_what_is_not_modelled_is_refused_by_name(more: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as refused:
        read({**LLAMA, **more})
    assert words in str(refused.value)
    assert str(refused.value).startswith("config.json: ")
    assert len(str(refused.value)) < 250
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps(LLAMA).replace("{", '{"hidden_size": 128, ', 1), "key 'hidden_size' is written twice"),
        ('{"a": ' * 40 + "1" + "}" * 40, "is nested more than 32 levels deep"),
        ('{"a": ' * 90_000, "is not valid JSON"),
        (json.dumps(LLAMA).replace("172", "1" * 5000), "is not valid JSON"),
        (json.dumps(without(LLAMA, "intermediate_size")), "no intermediate_size or n_inner"),
        ("null", "must hold a JSON object, not NoneType"),
    ],
    ids=["twice", "deep", "too deep", "long", "no width", "null"],
)
def test_odd_text_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read(text)


PLAIN = [name for name, known in known_models().items() if not known.why_not_plain()]


@pytest.mark.parametrize("name", PLAIN)
def test_known_models_are_read_back_from_the_configuration_made_of_them(name: str) -> None:
    known = known_models()[name]
    again = model_from_hf_config(hf_config_json(known), name=name, where="config.json")
    assert again.differences_from(known) == ""
    assert again.context_tokens == known.context_tokens
    assert again.decoder.parameters() == known.decoder.parameters()


@pytest.mark.parametrize("name", ["opt-1.3b", "bloom-7b1"])
def test_no_configuration_is_made_of_the_shape_for_families_with_other_keys(name: str) -> None:
    with pytest.raises(InputError, match="cannot be made from its shape: give its own"):
        hf_config_json(replace(known_models()[name], name="one of my own"))


def test_head_dim_counts_in_kv_cache_and_projections() -> None:
    plain, wide = read(LLAMA), read({**LLAMA, "head_dim": 16})
    assert kv_bytes(wide, "native") == 2 * kv_bytes(plain, "native")  # type: ignore[arg-type]
    feed_forward = 3 * 64 * 172
    assert layer_parameters(plain) - feed_forward == 2 * 64 * 64 + 2 * 64 * 16
    assert layer_parameters(wide) - feed_forward == 2 * (2 * 64 * 64 + 2 * 64 * 16)


def test_identity_comes_from_the_content() -> None:
    assert read(LLAMA) == read(LLAMA)
    assert read(LLAMA) != read({**LLAMA, "rope_theta": 5e5})
    assert read(LLAMA).differences_from(read({**LLAMA, "num_hidden_layers": 5})) == "layers 4, not 5"


def test_sequences_longer_than_the_context() -> None:
    model = read(LLAMA)
    assert model.why_too_long(256) is None
    assert model.why_too_long(257) == "a sequence of 257 tokens is longer than the 256 positions of mine"
    assert read(without(LLAMA, "max_position_embeddings")).why_too_long(10**9) is None


def test_hostile_files(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    with (tmp_path / "huge.json").open("wb") as huge:
        huge.truncate(1 << 40)
    for name, words in (("fifo", "is not a regular file"), ("zero", "is not a regular"), ("huge", "larger than 4 MiB")):
        with pytest.raises(InputError, match=words):
            load_model(str(tmp_path / f"{name}.json"))
