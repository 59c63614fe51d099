"""Times of operators: laws that hold on every GPU, and the counts that they rest on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maveriq.domain.gpu_kinds import NumberFormat, gpu_sheet, gpu_sheets
from maveriq.errors import UnknownNameError
from maveriq.estimate.experts import USUAL_KERNEL, ExpertLoad, experts_formula, experts_hit
from maveriq.estimate.kernel_bounds import BYTES_PER_WEIGHT
from maveriq.estimate.operators import (
    EngineKernels,
    Heads,
    Operators,
    attended_pairs,
    mixed_attention_us,
    operators_of,
)

EVERY = [operators_of(sheet) for sheet in gpu_sheets().values()]
MEASURED = [operators for operators in EVERY if operators.measured]
HEADS = Heads(heads=32, kv_heads=8, head_size=128)
NAMES = pytest.mark.parametrize("operators", EVERY, ids=lambda operators: operators.gpu.name)


def test_five_kinds_were_measured() -> None:
    assert {operators.gpu.name for operators in MEASURED} == {
        "A100-80GB-SXM", "H100-SXM", "H200-SXM", "L40S", "B200-SXM",
    }  # fmt: skip


def test_kinds_of_gpus_are_found_however_they_are_written() -> None:
    for text in ("H100", "h100-sxm", "H100 SXM", "h100_sxm"):
        assert gpu_sheet(text).name == "H100-SXM"
    with pytest.raises(UnknownNameError, match="H100-SXM"):
        gpu_sheet("H100-SXN")


@NAMES
@pytest.mark.parametrize("number_format", NumberFormat)
def test_no_product_beats_the_speed_of_the_gpu(operators: Operators, number_format: NumberFormat) -> None:
    m, n = np.meshgrid([1, 16, 100, 1000, 8192], [1024, 6144, 28672])
    k = 4096.0
    time_us = operators.gemm_us(number_format, m, n, k)
    computed_us = 2.0 * m * n * k / (max(operators.gpu.tflops.values()) * 1e6)
    moved = BYTES_PER_WEIGHT[number_format] * n * k
    moved_us = moved / (operators.gpu.bandwidth_gb_s * 1e3)
    assert (time_us >= 0.999 * np.maximum(computed_us, moved_us)).all()
    assert (time_us < 1e6).all()


@NAMES
def test_more_work_takes_longer(operators: Operators) -> None:
    rows = np.asarray([1.0, 256.0, 4096.0, 32768.0])
    assert (np.diff(operators.gemm_us(NumberFormat.BFLOAT16, rows, 8192, 8192)) > 0).all()
    for kv in (NumberFormat.BFLOAT16, NumberFormat.FP8):
        context = np.asarray([128.0, 2048.0, 32768.0, 131072.0])
        decode_us = operators.decode_attention_us(kv, 64, context, HEADS)
        assert (np.diff(decode_us) > 0).all()
        chunk = np.asarray([64.0, 1024.0, 8192.0])
        prefill_us = operators.prefill_attention_us(kv, chunk, 0.0, HEADS)
        assert (np.diff(prefill_us) > 0).all()
        behind_us = operators.prefill_attention_us(kv, 512.0, np.asarray([0.0, 4096.0, 65536.0]), HEADS)
        assert (np.diff(behind_us) > 0).all()
    sizes = np.asarray([1e3, 1e6, 1e8, 1e10])
    for gpus in (2, 4, 8, 16):
        assert (np.diff(operators.all_reduce_us(gpus, sizes)) > 0).all()


@NAMES
@pytest.mark.parametrize("number_format", NumberFormat)
def test_experts_take_longer_with_more_tokens(operators: Operators, number_format: NumberFormat) -> None:
    tokens = np.asarray([1.0, 64.0, 1024.0, 16384.0])
    for groups in (1, 8):
        load = ExpertLoad(
            pairs=8 * tokens, rows=8 * tokens / groups, hit=experts_hit(128, 8, tokens) / groups, inner_size=4096,
            width=1536, whole=groups > 1,
        )  # fmt: skip
        time_us = operators.experts_us(number_format, load)
        assert (np.diff(time_us) > 0).all()
        weights = BYTES_PER_WEIGHT[NumberFormat.NVFP4] * load.weights_per_expert * load.hit
        assert (time_us > weights / (operators.gpu.bandwidth_gb_s * 1e3)).all()


def test_experts_without_gate_have_fewer_weights() -> None:
    gated, plain = (
        ExpertLoad(pairs=8.0, rows=8.0, hit=8.0, inner_size=4096, width=1536, matrices=matrices) for matrices in (3, 2)
    )
    times = [experts_formula(MEASURED[0].gpu, NumberFormat.BFLOAT16, USUAL_KERNEL, load) for load in (gated, plain)]
    assert times[1].least_us == pytest.approx(2 / 3 * times[0].least_us)
    assert times[1].time_us < times[0].time_us


@given(st.floats(1, 1e6), st.floats(0.001, 1))
def test_rows_of_experts_are_padded_to_tiles(rows: float, share: float) -> None:
    load = ExpertLoad(pairs=rows, rows=rows, hit=max(1.0, share * rows), inner_size=1, width=1)
    assert rows <= load.padded_rows * (1 + 1e-9)
    assert load.padded_rows <= rows + 64 * load.hit * (1 + 1e-9)


@pytest.mark.parametrize("operators", MEASURED, ids=lambda operators: operators.gpu.name)
def test_sizes_that_were_not_measured_take_as_long_as_those_beside_them(operators: Operators) -> None:
    # Products of 16, 17 and 32 rows were measured, and of 257 and 512. A table with a point at 24 was off by half.
    n, k = np.meshgrid([2560.0, 4096.0, 7168.0, 12288.0, 22016.0], [4096.0, 5120.0, 8192.0, 11008.0])
    for number_format in operators._gemm:
        for low, size, high in ((16, 24, 32), (257, 384, 512)):
            below, at, above = (operators.gemm_us(number_format, rows, n, k) for rows in (low, size, high))
            assert (at < 1.03 * np.maximum(below, above)).all()
            assert (at > 0.97 * np.minimum(below, above)).all()


@pytest.mark.parametrize("operators", MEASURED, ids=lambda operators: operators.gpu.name)
@pytest.mark.parametrize("kv", [NumberFormat.BFLOAT16, NumberFormat.FP8])
def test_decoding_reads_the_kv_cache_from_memory(operators: Operators, kv: NumberFormat) -> None:
    # A benchmark that repeats a kernel finds small KV caches in the GPU's own cache, where an engine has left weights.
    sequences, context = np.meshgrid([1.0, 8.0, 64.0], [256.0, 512.0, 1024.0, 2048.0])
    bytes_us = (
        2 * sequences * HEADS.kv_heads * HEADS.head_size * BYTES_PER_WEIGHT[kv] * 1e-3 / (operators.gpu.bandwidth_gb_s)
    )
    least_us = operators.decode_attention_us(kv, sequences, 1.0, HEADS)
    longer_us = operators.decode_attention_us(kv, sequences, context, HEADS)
    launch_us = operators.decode_attention_us(kv, 1.0, 1.0, HEADS)
    assert (longer_us >= least_us).all()
    assert (longer_us - launch_us >= 0.9 * bytes_us * (context - 1) - 3).all()


@NAMES
def test_decoding_beside_chunks_is_never_faster_than_alone(operators: Operators) -> None:
    sequences, context = np.meshgrid([1.0, 8.0, 100.0, 1000.0], [10.0, 1000.0, 30000.0])
    at = (NumberFormat.BFLOAT16, sequences, context, HEADS)
    beside_us, alone_us = operators.mixed_decode_attention_us(*at), operators.decode_attention_us(*at)
    assert (beside_us >= alone_us).all()
    shares_a_call = operators.gpu.compute_capability < 9 or operators.gpu.compute_capability >= 12
    assert (beside_us > 1.3 * alone_us).any() == shares_a_call


@pytest.mark.parametrize("kind", ["H100-SXM", "H100-PCIE", "A6000", "B200-SXM"])
def test_a_call_of_attention_that_chunks_share_is_launched_once(kind: str) -> None:
    gpu = gpu_sheet(kind)
    apart, together = operators_of(gpu), operators_of(gpu, EngineKernels(one_hopper_attention=True))
    at = (NumberFormat.BFLOAT16, np.asarray([1.0, 8.0, 100.0, 1000.0]), 2000.0, HEADS)
    saved_us = apart.mixed_decode_attention_us(*at) - together.mixed_decode_attention_us(*at)
    if int(gpu.compute_capability) != 9:
        assert (saved_us == 0).all()
        return
    # A launch of FlashAttention 3 takes about 12 µs in the table of H100, and 10 by the data sheet alone.
    assert saved_us == pytest.approx(saved_us[0])
    assert 5 < saved_us[0] < 20
    assert (together.mixed_decode_attention_us(*at) >= 0).all()


def test_blocks_of_mixed_attention_run_in_waves() -> None:
    gpu, heads = gpu_sheet("RTX-PRO-6000"), Heads(heads=64, kv_heads=8, head_size=128)

    def at(sequences: float) -> float:
        return float(mixed_attention_us(gpu, 2.0, sequences, 4096.0, heads))

    assert at(1) == at(2)  # 64 and 128 blocks on 188 multiprocessors
    assert at(4) == pytest.approx(2 * at(2))
    # Measured for Qwen3-32B beside a chunk of 16: 97 µs, and 1,040 µs of 32 sequences.
    assert at(1) == pytest.approx(97, rel=0.15)
    assert at(32) == pytest.approx(1040, rel=0.15)


@given(st.integers(1, 60), st.integers(0, 60), st.integers(1, 80))
def test_pairs_are_counted_as_a_mask_counts_them(chunk: int, past: int, window: int) -> None:
    query, key = np.meshgrid(np.arange(past, past + chunk), np.arange(past + chunk), indexing="ij")
    mask = (key <= query) & (key > query - window)
    assert attended_pairs(chunk, past, window) == pytest.approx(mask.sum())
    assert attended_pairs(chunk, past) == pytest.approx((key <= query).sum())


@given(st.integers(1, 300), st.data(), st.integers(1, 5000))
def test_as_many_experts_are_hit_as_there_may_be(experts: int, data: st.DataObject, tokens: int) -> None:
    per_token = data.draw(st.integers(1, experts))
    hit = float(experts_hit(experts, per_token, np.asarray(float(tokens))))
    assert 0 < hit <= min(experts, tokens * per_token) * (1 + 1e-6)
    assert hit >= per_token * (1 - 1e-6)
    assert float(experts_hit(experts, per_token, np.asarray(1e9))) == pytest.approx(experts, rel=1e-3)


def test_one_gpu_adds_nothing_up() -> None:
    assert MEASURED[0].all_reduce_us(1, 1e9) == 0


def test_links_decide_how_long_an_all_reduce_takes() -> None:
    nvlink, pcie = operators_of(gpu_sheet("A100-40GB-SXM")), operators_of(gpu_sheet("A100-40GB-PCIE"))
    assert pcie.all_reduce_us(4, 1e6) > 3 * nvlink.all_reduce_us(4, 1e6)
