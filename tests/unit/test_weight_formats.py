"""Weights as checkpoints store them: sizes by hand, exceptions of several tools, published sizes of checkpoints."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from maveriq.domain.decoder_config import read_decoder
from maveriq.domain.models import load_model
from maveriq.domain.quantization_config import module_name
from maveriq.domain.weight_formats import FORMATS, NVFP4, fp8_blocks, int4_groups
from maveriq.errors import InputError

MOE = {
    "model_type": "qwen3_moe", "num_hidden_layers": 3, "hidden_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512, "moe_intermediate_size": 128, "num_experts": 8,
    "num_experts_per_tok": 2, "vocab_size": 1000, "tie_word_embeddings": False,
}  # fmt: skip
ATTENTION, EXPERTS, ROUTER = 2 * 256 * 256 + 2 * 256 * 128, 8 * 3 * 256 * 128, 256 * 8
NORMS = 2 * 256 + 2 * 64
AROUND = 2 * (2 * 1000 * 256 + 256)
"""Bytes of embedding, output and last norm."""
MATRICES = 4 + 8 * 3


def stored(quantization: dict[str, Any] | None, modelopt: dict[str, Any] | None = None, **more: Any) -> int:
    config = {**MOE, **more, "quantization_config": quantization}
    beside = None if modelopt is None else {"quantization": modelopt}
    return read_decoder(json.loads(json.dumps(config)), "config.json", beside).decoder.weight_bytes()


def layers(quantised: int, other: int, scales: int) -> int:
    """Bytes of three layers, of 8-bit weights, 16-bit weights and scales in bytes; and what stands around them."""
    return AROUND + 3 * (quantised + 2 * other + scales)


def test_without_quantisation_all_weights_have_16_bits() -> None:
    assert stored(None) == layers(0, ATTENTION + EXPERTS + ROUTER + NORMS, 0)


def test_fp8_in_blocks_and_per_tensor() -> None:
    blocks = (2 * (2 * 2) + 2 * (2 * 1) + 24 * (2 * 1)) * 4
    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert stored(block) == layers(ATTENTION + EXPERTS, ROUTER + NORMS, blocks)
    assert stored({"quant_method": "fp8"}) == layers(ATTENTION + EXPERTS, ROUTER + NORMS, MATRICES * 8)
    assert fp8_blocks(128, 128).bytes_of(7168, 576) == 7168 * 576 + 56 * 5 * 4, "a part of a block has a scale too"


@pytest.mark.parametrize(
    "exceptions",
    [
        ["self_attn"], ["model.layers.*.self_attn"], ["re:.*self_attn.*"], ["*.self_attn.*"],
        [f"model.layers.{layer}.self_attn*" for layer in range(3)],
        [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(3) for part in "qkvo"],
        ["language_model.model.layers.0.self_attn", "model.language_model.layers.1.attn.*", "layers.2.attention"],
    ],
)  # fmt: skip
def test_exceptions_of_several_tools(exceptions: list[str]) -> None:
    found = stored({"quant_method": "fp8", "modules_to_not_convert": [*exceptions, "lm_head"]})
    assert found == layers(EXPERTS, ATTENTION + ROUTER + NORMS, 24 * 8)


def test_a_whole_layer_that_is_left_out() -> None:
    modelopt = {"quant_algo": "FP8", "exclude_modules": ["model.layers.0*", "lm_head"]}
    whole = ATTENTION + EXPERTS
    assert stored(None, modelopt) == layers(whole, ROUTER + NORMS, MATRICES * 8) + whole - MATRICES * 8
    twelve = {**modelopt, "exclude_modules": ["model.layers.1*"]}
    assert stored(None, twelve, num_hidden_layers=11) < stored(None, num_hidden_layers=11) - 8 * whole


def test_4_bits() -> None:
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128}
    assert stored(awq) == layers((ATTENTION + EXPERTS) // 2, ROUTER + NORMS, (ATTENTION + EXPERTS) // 128 * 20 // 8)
    nvfp4 = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "*self_attn*"]}
    assert stored(None, nvfp4) == layers(EXPERTS // 2, ATTENTION + ROUTER + NORMS, EXPERTS // 16 + 24 * 8)
    mxfp4 = {"quant_method": "mxfp4"}
    assert stored(mxfp4) == layers(EXPERTS // 2, ATTENTION + ROUTER + NORMS, EXPERTS // 32)
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    assert stored(four) == layers((ATTENTION + EXPERTS) // 2, ROUTER + NORMS, (ATTENTION + EXPERTS) // 64 * 4)


def test_compressed_tensors() -> None:
    weights = {"num_bits": 4, "type": "int", "group_size": 32, "symmetric": True, "strategy": "group"}
    group = {"targets": ["Linear"], "weights": weights}
    given = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["re:.*self_attn.*"]}
    assert stored(given) == layers(EXPERTS // 2, ATTENTION + ROUTER + NORMS, EXPERTS // 32 * 2)


def test_layers_of_several_formats() -> None:
    mixed = {
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {
            **{f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj": {"quant_algo": "NVFP4", "group_size": 16}
               for layer in range(3) for expert in range(8) for part in ("gate", "up", "down")},
            **{f"model.layers.{layer}.self_attn.{part}_proj": {"quant_algo": "FP8"}
               for layer in (0, 1) for part in "qkvo"},
            "lm_head": {"quant_algo": "FP8"},
        },
    }  # fmt: skip
    sixteen = layers(EXPERTS // 2, ROUTER + NORMS, EXPERTS // 16 + 24 * 8)
    assert stored(None, mixed) == sixteen + 2 * (ATTENTION + 4 * 8) + 2 * ATTENTION - 1000 * 256 + 8


def test_any_model_in_a_planned_format() -> None:
    decoder = read_decoder(MOE, "config.json").decoder
    for name, bits in (("float16", 16), ("fp8", 8), ("int8", 8), ("int4", 4.16), ("nvfp4", 4.5), ("mxfp4", 4.25)):
        around = AROUND + 3 * 2 * (ROUTER + NORMS)
        planned = decoder.weight_bytes(FORMATS[name]) - around
        assert planned == pytest.approx(3 * (ATTENTION + EXPERTS) * bits / 8, rel=0.03), name
    assert decoder.layers_bytes(NVFP4, 0, 1) * 3 + AROUND == decoder.weight_bytes(NVFP4)
    assert int4_groups("int4", 128, zero_points=True).bytes_of(256, 8) == 256 * 8 // 2 + 16 * 20 // 8


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "quip"}, "weights quantised by 'quip' are not modelled"),
        ({"quant_method": None}, "weights quantised by None"),
        ({"quant_method": "awq", "bits": 3}, "'awq' with 3 bits"),
        ({"quant_method": "awq", "bits": 4, "group_size": "many"}, "group_size must be a positive whole number"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size must be two numbers"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size must be a positive whole number"),
        ({"quant_method": "fp8", "modules_to_not_convert": [1]}, "modules_to_not_convert must name modules"),
        ({"quant_method": "fp8", "modules_to_not_convert": ["re:("]}, "is not a regular expression"),
        ({"quant_method": "modelopt", "quant_algo": "FP3"}, "quant_algo 'FP3' is not modelled"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "INT3"}, "'INT3'"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit or load_in_8bit"),
        ([1], "quantization_config must be an object"),
    ],
)  # fmt: skip
def test_other_quantisation_is_refused_by_name(quantization: Any, words: str) -> None:
    with pytest.raises(InputError) as refused:
        stored(quantization)
    assert words in str(refused.value)


def test_names_of_modules() -> None:
    for name, expected in {
        "model.layers.3.self_attn.kv_a_proj_with_mqa": "layers.3.self_attn.kv_a_proj",
        "language_model.model.layers.3.block_sparse_moe.experts.92.w1": "layers.3.mlp.experts.gate_proj",
        "language_model.model.layers.0.feed_forward.router": "layers.0.mlp.gate",
        "model.language_model.layers.0.mlp.shared_expert.down_proj": "layers.0.mlp.shared_experts.down_proj",
        "layers.3.ffn.experts": "layers.3.mlp.experts",
        "lm_head": "lm_head",
    }.items():
        assert module_name(name) == expected


# Sizes of the published files, in decimal GB, as the model's page or its index of weights says.
PUBLISHED_GB = {
    "openai--gpt-oss-120b": 65.25,  # metadata.total_size of the index: 65,248,815,744
}


@pytest.mark.skipif("MAVERIQ_DATA" not in os.environ, reason="MAVERIQ_DATA has the configurations")
@pytest.mark.parametrize("name", PUBLISHED_GB)
def test_sizes_of_published_checkpoints(name: str) -> None:
    decoder = load_model(str(Path(os.environ["MAVERIQ_DATA"]) / "models" / name)).decoder
    assert decoder.weight_bytes() / 1e9 == pytest.approx(PUBLISHED_GB[name], rel=0.0005)


@pytest.mark.skipif("MAVERIQ_DATA" not in os.environ, reason="MAVERIQ_DATA has the configurations")
def test_deepseek_without_the_layer_that_predicts_a_further_token() -> None:
    """The index says 688,586,727,753 bytes with that layer: a layer with experts, a projection of two hidden states,
    and copies of embedding and output."""
    decoder = load_model(str(Path(os.environ["MAVERIQ_DATA"]) / "models" / "deepseek-ai--DeepSeek-R1")).decoder
    further = decoder.layers_bytes(first=60) + 2 * 2 * 129280 * 7168 + 2 * 2 * 7168 * 7168
    assert (decoder.weight_bytes() + further) / 688_586_727_753 == pytest.approx(1, abs=2e-4)
