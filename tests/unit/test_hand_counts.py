"""Parameters and bytes of well-known models, counted by hand from their papers and cards, without their configurations.

The sums are the numbers of parameters that Hugging Face shows for the files of the models.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from maveriq.domain.models import load_model
from maveriq.domain.weight_formats import FORMATS


def grouped(hidden: int, heads: int, kv_heads: int, size: int) -> int:
    """Queries and output, keys and values."""
    return 2 * hidden * heads * size + 2 * hidden * kv_heads * size


def latent(hidden: int, heads: int, query_rank: int, kv_rank: int, nope: int, rope: int, value: int) -> int:
    """Queries (over a latent vector where there is one), latent keys and values, their expansion, output; two norms."""
    queries = hidden * heads * (nope + rope)
    if query_rank:
        queries = hidden * query_rank + query_rank + query_rank * heads * (nope + rope)
    return queries + hidden * (kv_rank + rope) + kv_rank + kv_rank * heads * (nope + value) + heads * value * hidden


def gated(hidden: int, width: int) -> int:
    return 3 * hidden * width


LLAMA_3_8B = grouped(4096, 32, 8, 128) + gated(4096, 14336) + 2 * 4096
LLAMA_3_70B = grouped(8192, 64, 8, 128) + gated(8192, 28672) + 2 * 8192
LLAMA_2_7B = grouped(4096, 32, 32, 128) + gated(4096, 11008) + 2 * 4096
LLAMA_3_1B = grouped(2048, 32, 8, 64) + gated(2048, 8192) + 2 * 2048
MIXTRAL = grouped(4096, 32, 8, 128) + 8 * gated(4096, 14336) + 8 * 4096 + 2 * 4096
QWEN_2_7B = grouped(3584, 28, 4, 128) + (28 + 2 * 4) * 128 + gated(3584, 18944) + 2 * 3584
QWEN_3_32B = grouped(5120, 64, 8, 128) + 2 * 128 + gated(5120, 25600) + 2 * 5120
QWEN_3_30B = grouped(2048, 32, 4, 128) + 2 * 128 + 128 * gated(2048, 768) + 128 * 2048 + 2 * 2048
GEMMA_2_9B = grouped(3584, 16, 8, 256) + gated(3584, 14336) + 4 * 3584
GPT_OSS_ATTENTION = grouped(2880, 64, 8, 64) + (64 + 2 * 8) * 64 + 2880 + 64  # biases, a sink a head
GPT_OSS_EXPERT = gated(2880, 2880) + 2 * 2880 + 2880
GPT_OSS_120B = GPT_OSS_ATTENTION + 128 * (GPT_OSS_EXPERT + 2880 + 1) + 2 * 2880
DEEPSEEK_ATTENTION = latent(7168, 128, 1536, 512, 128, 64, 128) + 2 * 7168
DEEPSEEK_DENSE = DEEPSEEK_ATTENTION + gated(7168, 18432)
DEEPSEEK_SPARSE = DEEPSEEK_ATTENTION + 257 * gated(7168, 2048) + 256 * 7168 + 256
FALCON_7B = 4544 * (71 + 2) * 64 + 4544 * 71 * 64 + 2 * 4544 * 4 * 4544 + 2 * 4544
BLOOM = 4 * 14336 * 14336 + 4 * 14336 + 2 * 14336 * 57344 + 57344 + 14336 + 4 * 14336
OPT_13B = 4 * 5120 * 5120 + 4 * 5120 + 2 * 5120 * 20480 + 20480 + 5120 + 4 * 5120

BY_HAND: Mapping[str, tuple[int, int]] = {
    # layers and the rest (embedding, output, last norm, positions), and the published number
    "llama-3.1-8b": (32 * LLAMA_3_8B + 2 * 128256 * 4096 + 4096, 8_030_261_248),
    "llama-3.1-70b": (80 * LLAMA_3_70B + 2 * 128256 * 8192 + 8192, 70_553_706_496),
    "llama-2-7b": (32 * LLAMA_2_7B + 2 * 32000 * 4096 + 4096, 6_738_415_616),
    "llama-3.2-1b": (16 * LLAMA_3_1B + 128256 * 2048 + 2048, 1_235_814_400),
    "mixtral-8x7b": (32 * MIXTRAL + 2 * 32000 * 4096 + 4096, 46_702_792_704),
    "qwen2.5-7b": (28 * QWEN_2_7B + 2 * 152064 * 3584 + 3584, 7_615_616_512),
    "qwen3-32b": (64 * QWEN_3_32B + 2 * 151936 * 5120 + 5120, 32_762_123_264),
    "qwen3-30b-a3b": (48 * QWEN_3_30B + 2 * 151936 * 2048 + 2048, 30_532_122_624),
    "gemma-2-9b": (42 * GEMMA_2_9B + 256000 * 3584 + 3584, 9_241_705_984),
    "gpt-oss-120b": (36 * GPT_OSS_120B + 2 * 201088 * 2880 + 2880, 116_829_156_672),
    "deepseek-v3": (3 * DEEPSEEK_DENSE + 58 * DEEPSEEK_SPARSE + 2 * 129280 * 7168 + 7168, 671_026_419_200),
    "falcon-7b": (32 * FALCON_7B + 65024 * 4544 + 2 * 4544, 6_921_720_704),
    "bloom-176b": (70 * BLOOM + 250880 * 14336 + 2 * 14336 + 2 * 14336, 176_247_271_424),
    "opt-13b": (40 * OPT_13B + (50272 + 2050) * 5120 + 2 * 5120, 12_853_473_280),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_parameters_are_those_counted_by_hand_and_published(name: str) -> None:
    by_hand, published = BY_HAND[name]
    assert load_model(name).decoder.parameters() == by_hand == published


# Matrices of a layer without norms and biases.
QUANTISED: Mapping[str, tuple[int, int, int, int]] = {
    # layers, weights of a layer's matrices, their output rows, other weights
    "llama-3.1-8b": (
        32, LLAMA_3_8B - 2 * 4096, 4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096, 2 * 128256 * 4096 + (32 * 2 + 1) * 4096,
    ),
    "llama-2-7b": (
        32, LLAMA_2_7B - 2 * 4096, 4 * 4096 + 2 * 11008 + 4096, 2 * 32000 * 4096 + (32 * 2 + 1) * 4096,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTISED)
def test_bytes_of_quantised_weights_are_those_counted_by_hand(name: str) -> None:
    layers, weights, rows, others = QUANTISED[name]
    decoder = load_model(name).decoder
    # A byte a weight and 32 bits a row; half a byte, and 16 + 4 bits for each 128 weights.
    assert decoder.weight_bytes(FORMATS["int8"]) == layers * (weights + 4 * rows) + 2 * others
    assert decoder.weight_bytes(FORMATS["int4"]) == layers * (weights // 2 + weights * 20 // 128 // 8) + 2 * others
