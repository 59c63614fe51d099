"""Times of steps: what must add up, and what must not matter."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maveriq.domain.decoder import (
    Attention,
    Decoder,
    DenseFeedForward,
    ExpertFeedForward,
    FeedForward,
    GroupedAttention,
    LatentAttention,
    LayerKind,
)
from maveriq.domain.gpu_kinds import NumberFormat, gpu_sheet
from maveriq.errors import InputError
from maveriq.estimate.operators import operators_of
from maveriq.estimate.step_time import Chunk, Formats, Sharding, StepModel, stage_models

H100 = operators_of(gpu_sheet("H100-SXM"))
GROUPED = GroupedAttention(heads=32, kv_heads=8, head_size=128)
LATENT = LatentAttention(heads=64, query_rank=1536, kv_rank=512, nope_size=128, rope_size=64, value_size=128)
DENSE = DenseFeedForward(width=14336)
EXPERTS = ExpertFeedForward(experts=64, experts_per_token=6, width=1408, shared_width=2816)


def decoder(*layers: tuple[Attention, FeedForward]) -> Decoder:
    kinds = [LayerKind(attention=attention, feed_forward=feed_forward) for attention, feed_forward in layers]
    distinct = tuple(dict.fromkeys(kinds))
    return Decoder(
        hidden_size=4096, vocab_size=128256, tied_embeddings=False, layer_kinds=distinct,
        layer_pattern=tuple(distinct.index(kind) for kind in kinds),
    )  # fmt: skip


LLAMA = decoder(*[(GROUPED, DENSE)] * 32)
MIXED = decoder((LATENT, DENSE), *[(LATENT, EXPERTS)] * 6, (GROUPED, DENSE))
CHUNKS = [Chunk(tokens=700, past=300), Chunk(tokens=20)]


def step_us(model: StepModel) -> float:
    return model.gpu_us(decodes=24, context_tokens=24 * 900, chunks=CHUNKS)


@pytest.mark.parametrize("model", [LLAMA, MIXED], ids=["llama", "mixed"])
@pytest.mark.parametrize("tp", [1, 4])
def test_the_stages_of_a_pipeline_add_up_to_the_whole(model: Decoder, tp: int) -> None:
    sharding, formats = Sharding(tp=tp), Formats()
    whole = StepModel(model, H100, sharding=sharding, formats=formats)
    split = (1, model.layers - 3, 2)
    stages = stage_models(model, H100, split, sharding=sharding, formats=formats)
    assert sum(map(step_us, stages)) == pytest.approx(step_us(whole))


def test_an_empty_step_takes_no_time() -> None:
    assert StepModel(LLAMA, H100).gpu_us(decodes=0, context_tokens=0) == 0


@given(st.integers(1, 500), st.integers(1, 20000), st.integers(1, 8000), st.integers(0, 50000))
def test_more_work_never_takes_less_time(decodes: int, context: int, tokens: int, past: int) -> None:
    model = StepModel(decoder((GROUPED, DENSE)), H100)

    def at(decodes: int, context: int, *chunks: Chunk) -> float:
        return model.gpu_us(decodes=decodes, context_tokens=decodes * context, chunks=chunks)

    # Libraries choose other kernels for other sizes: a little more work may take a little less time.
    alone = 0.97 * at(decodes, context)
    assert alone > 0
    assert at(decodes, 2 * context + 600) > alone
    assert at(2 * decodes + 40, context) > alone
    assert at(decodes, context, Chunk(tokens=tokens, past=past)) > alone
    assert at(0, 0, Chunk(tokens=tokens, past=2 * past + 600)) > 0.97 * at(0, 0, Chunk(tokens=tokens, past=past))


def test_decoding_one_sequence_reads_all_weights_once() -> None:
    weights = 2 * (LLAMA.layers_parameters() + LLAMA.head_parameters)
    bound_us = weights / (H100.gpu.bandwidth_gb_s * 1e3)
    assert bound_us < StepModel(LLAMA, H100).gpu_us(decodes=1, context_tokens=100) < 1.6 * bound_us


def test_prefill_of_long_prompts_is_bound_by_the_speed_of_the_gpu() -> None:
    operations = 2 * LLAMA.layers_parameters() * 8192
    bound_us = operations / (989 * 1e6)
    time_us = StepModel(LLAMA, H100).gpu_us(decodes=0, context_tokens=0, chunks=[Chunk(tokens=8192)])
    assert bound_us < time_us < 2 * bound_us


def test_a_window_bounds_what_decoding_attends_to() -> None:
    windowed = StepModel(
        decoder(*[(GroupedAttention(heads=32, kv_heads=8, head_size=128, window=512), DENSE)] * 4), H100
    )
    full = StepModel(decoder(*[(GROUPED, DENSE)] * 4), H100)
    at_window = windowed.gpu_us(decodes=32, context_tokens=32 * 512)
    assert windowed.gpu_us(decodes=32, context_tokens=32 * 16384) == pytest.approx(at_window)
    # Kernels with a window are others, but not much slower or faster on this GPU.
    assert at_window == pytest.approx(full.gpu_us(decodes=32, context_tokens=32 * 512), rel=0.1)
    assert full.gpu_us(decodes=32, context_tokens=32 * 16384) > 1.5 * at_window


def test_smaller_weights_make_decoding_faster() -> None:
    times = [
        StepModel(LLAMA, H100, formats=Formats(weights=number_format)).gpu_us(decodes=1, context_tokens=100)
        for number_format in (NumberFormat.BFLOAT16, NumberFormat.FP8, NumberFormat.INT4)
    ]
    assert times == sorted(times, reverse=True)


@given(st.integers(1, 2000), st.integers(0, 4000), st.integers(2, 16))
def test_chunks_of_a_step_share_the_gpu(tokens: int, past: int, count: int) -> None:
    model = StepModel(LLAMA, H100)
    chunk = Chunk(tokens=tokens, past=past)
    together = model.gpu_us(decodes=0, context_tokens=0, chunks=[chunk] * count)
    alone = model.gpu_us(decodes=0, context_tokens=0, chunks=[chunk])
    assert 0.97 * alone < together < 1.03 * count * alone


def test_short_chunks_cost_little_beside_others() -> None:
    model = StepModel(LLAMA, H100)
    few, many = (
        model.gpu_us(decodes=0, context_tokens=0, chunks=[Chunk(tokens=512 // count)] * count) for count in (2, 16)
    )
    assert many < few + 1000  # sixteen launches in 32 layers would take four milliseconds


def test_more_gpus_make_a_step_faster_but_less_than_proportionally() -> None:
    one, four = (StepModel(LLAMA, H100, sharding=Sharding(tp=tp)) for tp in (1, 4))
    assert step_us(four) < step_us(one) < 4 * step_us(four)


def test_expert_parallelism_divides_the_gpus_of_a_stage() -> None:
    with pytest.raises(InputError, match="must divide the 4 GPUs"):
        Sharding(tp=4, ep=3)
    shared, dealt = (StepModel(MIXED, H100, sharding=Sharding(tp=4, ep=ep)) for ep in (1, 4))
    assert step_us(dealt) == pytest.approx(step_us(shared), rel=0.5)
