"""Which GPUs can share a model's layers, and which formats a GPU can compute with."""

from __future__ import annotations

import pytest

from maveriq.domain.gpu_kinds import NumberFormat, gpu_sheet, gpu_sheets, number_format_of
from maveriq.domain.models import load_model
from maveriq.domain.parallel import ParallelConfig, WeightType
from maveriq.domain.sharding import expert_parallel_degrees, tensor_parallel_divisors, why_not_shared
from maveriq.domain.weight_formats import FORMATS, NF4, fp8_blocks
from maveriq.errors import InputError

BLOCKS = fp8_blocks(128, 128)


def test_tensor_parallelism_takes_any_divisor_of_the_heads() -> None:
    assert tensor_parallel_divisors(load_model("llama-2-13b").decoder, 16) == [1, 2, 4, 5, 8, 10]  # 40 heads
    assert tensor_parallel_divisors(load_model("falcon-7b").decoder, 16) == [1]  # 71 heads
    assert tensor_parallel_divisors(load_model("deepseek-v3").decoder, 8) == [1, 2, 4, 8]


def test_only_models_with_experts_deal_them_out() -> None:
    assert expert_parallel_degrees(load_model("llama-2-7b").decoder, 8) == [1]
    assert expert_parallel_degrees(load_model("mixtral-8x7b").decoder, 8) == [1, 8]
    assert expert_parallel_degrees(load_model("mixtral-8x7b").decoder, 1) == [1]
    assert "has none" in (why_not_shared(load_model("llama-2-7b").decoder, tp=2, ep=2) or "")
    assert "EP 16 does not divide the 8 experts" in (
        why_not_shared(load_model("mixtral-8x7b").decoder, tp=16, ep=16) or ""
    )
    with pytest.raises(InputError, match="EP 3 must divide the 4 GPUs"):
        ParallelConfig(tp=4, pp=1, ep=3, weights=WeightType.FLOAT16)


@pytest.mark.parametrize(
    ("model", "tp", "reason"),
    [
        ("qwen2.5-7b", 8, "TP 8 does not divide the 28 attention heads"),
        ("llama-2-13b", 5, "TP 5 does not divide the feed-forward width 13824"),
        ("phi-3-medium", 4, "TP 4 neither divides the 10 KV heads"),
        ("gemma-2-9b", 16, None),  # 8 KV heads, each copied
    ],
)
def test_what_gpus_cannot_share_is_named(model: str, tp: int, reason: str | None) -> None:
    found = why_not_shared(load_model(model).decoder, tp=tp)
    assert found == reason if reason is None else reason in (found or "")


def test_scales_of_blocks_are_not_cut() -> None:
    # 1536 values of an expert over 8 GPUs are 192, one block of 128 and a half: engines refuse it, or deal experts out.
    decoder = load_model("qwen3-235b-a22b").decoder
    assert "192 values of mlp.experts" in (why_not_shared(decoder, tp=8, stored_as=BLOCKS) or "")
    assert why_not_shared(decoder, tp=4, stored_as=BLOCKS) is None
    assert why_not_shared(decoder, tp=8, ep=8, stored_as=BLOCKS) is None
    assert why_not_shared(decoder, tp=8) is None
    assert why_not_shared(load_model("gpt-oss-120b").decoder, tp=8) is None  # blocks of 32 are padded
    llama = load_model("llama-2-7b").decoder
    assert "mlp.down_proj" in (why_not_shared(llama, tp=4, stored_as=FORMATS["int4"]) or "")


@pytest.mark.parametrize("kind", gpu_sheets())
def test_a_generation_computes_the_formats_of_its_data_sheet(kind: str) -> None:
    sheet = gpu_sheet(kind)
    for number_format in (NumberFormat.FP8, NumberFormat.NVFP4):
        assert (sheet.why_not_computed(number_format) is None) == (number_format in sheet.tflops)
    for number_format in (NumberFormat.BFLOAT16, NumberFormat.INT8, NumberFormat.INT4, NumberFormat.MXFP4):
        assert sheet.why_not_computed(number_format) is None


def test_formats_of_checkpoints_are_computed_in_one_format() -> None:
    assert number_format_of(BLOCKS) is NumberFormat.FP8_BLOCK
    assert number_format_of(FORMATS["fp8"]) is NumberFormat.FP8
    assert number_format_of(FORMATS["int4_gptq"]) is NumberFormat.INT4
    assert number_format_of(FORMATS["float16"]) is NumberFormat.BFLOAT16
    assert number_format_of(NF4) is None
