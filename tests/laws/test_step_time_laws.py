"""Laws of step times: more work never takes less time, whatever noise the tables of measured kernels have."""

from itertools import pairwise

import pytest

from maveriq.domain.gpu_kinds import NumberFormat, gpu_sheet
from maveriq.domain.models import load_model
from maveriq.estimate.operators import operators_of
from maveriq.estimate.step_time import Chunk, Formats, Sharding, StepModel
from maveriq.streams import generator

# A product of one row in fp8 on a B200 was measured at three times the time of two; others differ by percents.
CASES = [
    ("llama-3.2-1b", "B200-SXM", 1, NumberFormat.FP8),
    ("mistral-7b", "H200-SXM", 8, NumberFormat.FP8),
    ("gemma-2-9b", "H100-SXM", 1, NumberFormat.FP8),
    ("mixtral-8x7b", "H100-SXM", 2, NumberFormat.BFLOAT16),
    ("llama-3.1-8b", "MI300X", 1, NumberFormat.BFLOAT16),
]


@pytest.mark.parametrize(("name", "kind", "tp", "weights"), CASES)
def test_more_work_never_takes_less(name: str, kind: str, tp: int, weights: NumberFormat) -> None:
    model = StepModel(
        load_model(name).decoder, operators_of(gpu_sheet(kind)), sharding=Sharding(tp=tp),
        formats=Formats(weights=weights),
    )  # fmt: skip

    def us(decodes: int, context: int, *chunks: Chunk) -> float:
        return model.gpu_us(decodes=decodes, context_tokens=decodes * context, chunks=chunks)

    times_us = [us(decodes, 1000) for decodes in range(1, 300)]
    assert times_us == sorted(times_us)
    draw = generator(12, "laws of step times")
    for _ in range(100):
        decodes, context, past = (int(draw.integers(low, high)) for low, high in ((0, 300), (1, 8000), (0, 3000)))
        other = Chunk(tokens=int(draw.integers(1, 2048)))
        chunk = Chunk(tokens=int(draw.integers(1, 2048)), past=past)
        growing = [
            us(decodes, context, chunk),
            us(decodes + 1, context, chunk),
            us(decodes + 1, context + 64, chunk),
            us(decodes + 1, context + 64, Chunk(tokens=chunk.tokens, past=past + 100)),
            us(decodes + 1, context + 64, Chunk(tokens=chunk.tokens + 16, past=past + 100)),
            us(decodes + 1, context + 64, Chunk(tokens=chunk.tokens + 16, past=past + 100), other),
        ]
        assert all(more > less * (1 - 1e-9) for less, more in pairwise(growing)), growing
