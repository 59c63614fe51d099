"""The memory of an engine: recorded numbers of KV blocks, and what must hold of any."""

from __future__ import annotations

from dataclasses import replace

import pytest

from maveriq.domain.gpu_kinds import gpu_sheet
from maveriq.domain.models import load_model
from maveriq.domain.weight_formats import FORMATS
from maveriq.errors import InputError
from maveriq.estimate.engine_memory import EngineSettings, predict_kv_blocks, token_bytes, why_batch_does_not_fit

H100 = gpu_sheet("H100-SXM")
VLLM_0_15 = EngineSettings(max_num_batched_tokens=2048, gpu_memory_utilization=0.90)
VLLM_0_23 = EngineSettings(max_num_batched_tokens=8192, gpu_memory_utilization=0.92)


@pytest.mark.parametrize(
    ("model", "tp", "settings", "blocks"),
    [
        ("llama-2-7b", 1, VLLM_0_15, 7462),
        ("llama-2-70b", 4, VLLM_0_15, 31356),
        ("mixtral-8x7b", 2, VLLM_0_15, 27510),
        ("codellama-34b", 2, VLLM_0_15, 26602),
        ("qwen3-14b", 1, VLLM_0_23, 18038),
    ],
)
def test_kv_blocks_are_those_of_recorded_runs(model: str, tp: int, settings: EngineSettings, blocks: int) -> None:
    # inference-sim/training c4f0340 and inference-sim/residency-vllm 2641b57: num_gpu_blocks of vLLM's logs
    predicted = predict_kv_blocks(load_model(model).decoder, H100, tp=tp, settings=settings)
    assert predicted == pytest.approx(blocks, rel=0.01)


def test_larger_steps_and_weights_leave_fewer_blocks() -> None:
    decoder = load_model("llama-3.1-8b").decoder
    usual = predict_kv_blocks(decoder, H100)
    assert predict_kv_blocks(decoder, H100, settings=EngineSettings(max_num_batched_tokens=32768)) < usual
    assert predict_kv_blocks(decoder, H100, stored_as=FORMATS["fp8"]) > usual
    halved = predict_kv_blocks(decoder, H100, settings=EngineSettings(kv_value_bytes=1.0))
    assert halved == pytest.approx(2 * usual, abs=2)


def test_latent_vectors_are_kept_by_every_gpu() -> None:
    latent, grouped = load_model("deepseek-v3").decoder, load_model("llama-3.1-70b").decoder
    assert token_bytes(latent, tp=8, kv_value_bytes=2) == token_bytes(latent, tp=1, kv_value_bytes=2)
    assert token_bytes(grouped, tp=8, kv_value_bytes=2) == token_bytes(grouped, tp=1, kv_value_bytes=2) / 8
    assert token_bytes(grouped, tp=16, kv_value_bytes=2) == token_bytes(grouped, tp=8, kv_value_bytes=2)


def test_a_model_that_does_not_fit_leaves_no_block() -> None:
    blocks = predict_kv_blocks(load_model("llama-3.1-405b").decoder, H100)
    assert blocks == 0
    assert "does not fit" in (why_batch_does_not_fit(blocks, EngineSettings(), batch=1, tokens=1) or "")


def test_the_longest_sequence_is_bounded_by_blocks() -> None:
    settings = EngineSettings(block_size=16)
    assert why_batch_does_not_fit(100, settings, batch=1, tokens=1600) is None
    reason = why_batch_does_not_fit(100, settings, batch=1, tokens=1601)
    assert reason == "a sequence of 1601 tokens does not fit: the 100 KV blocks left hold 1600 tokens"
    assert why_batch_does_not_fit(100, settings, batch=50, tokens=32) is None
    assert "50 sequences of 33 tokens" in (why_batch_does_not_fit(100, settings, batch=50, tokens=33) or "")


@pytest.mark.parametrize("wrong", [{"block_size": 0}, {"max_num_batched_tokens": 0}, {"gpu_memory_utilization": 1.5}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        replace(EngineSettings(), **wrong)
