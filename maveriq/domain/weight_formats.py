"""How a weight matrix is stored: bits of a weight, and the scales of blocks of weights.

The sizes are those of checkpoints as their tools write them, checked against the published sizes of whole checkpoints
(tests/unit/test_weight_formats.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from maveriq.units import Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """How a weight matrix is stored.

    Args:
        name: the name of the format, as in `WeightType` where that has it.
        bits: bits of a weight.
        scale_bits: bits that the weights of a block share: a scale, and a zero point where there is one.
        block_inputs: weights along the input that share a scale; 0 for all.
        block_outputs: weights along the output that share it; 0 for all.
        matrix_bytes: bytes beside, one set a matrix.
    """

    name: str
    bits: int
    scale_bits: int = 0
    block_inputs: int = 0
    block_outputs: int = 1
    matrix_bytes: int = 0

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of a weight with its share of the scales of its block; scales of whole channels do not count."""
        block = self.block_inputs * self.block_outputs
        return (self.bits + (self.scale_bits / block if block else 0)) / 8

    def bytes_of(self, inputs: int, outputs: int) -> Bytes:
        """Return the bytes of one matrix."""
        along = -(-inputs // self.block_inputs) if self.block_inputs else 1
        across = -(-outputs // self.block_outputs) if self.block_outputs else 1
        scales = along * across * self.scale_bits
        return -(-(inputs * outputs * self.bits + scales) // 8) + self.matrix_bytes


BITS_16 = WeightFormat(name="float16", bits=16)
FP8_PER_TENSOR = WeightFormat(name="fp8", bits=8, matrix_bytes=8)
FP8_PER_CHANNEL = WeightFormat(name="fp8", bits=8, scale_bits=32)
MXFP8 = WeightFormat(name="mxfp8", bits=8, scale_bits=8, block_inputs=32)
INT8 = WeightFormat(name="int8", bits=8, scale_bits=32)
INT4_BY_CHANNEL = WeightFormat(name="int4", bits=4, scale_bits=16)
NVFP4 = WeightFormat(name="nvfp4", bits=4, scale_bits=8, block_inputs=16, matrix_bytes=8)
MXFP4 = WeightFormat(name="mxfp4", bits=4, scale_bits=8, block_inputs=32)
NF4 = WeightFormat(name="nf4", bits=4, scale_bits=32, block_inputs=64)


def fp8_blocks(outputs: int, inputs: int, scale_bits: int = 32) -> WeightFormat:
    """Return 8-bit floats with a scale for each block of so many outputs by inputs."""
    return WeightFormat(name="fp8", bits=8, scale_bits=scale_bits, block_inputs=inputs, block_outputs=outputs)


def int4_groups(name: str, group: int, *, zero_points: bool) -> WeightFormat:
    """Return 4-bit integers with a 16-bit scale for each group along the input, and maybe a 4-bit zero point."""
    return WeightFormat(name=name, bits=4, scale_bits=20 if zero_points else 16, block_inputs=group)


FORMATS: Mapping[str, WeightFormat] = {
    "float16": BITS_16,
    "bfloat16": BITS_16,
    "fp8": FP8_PER_CHANNEL,
    "int8": INT8,
    "int4": int4_groups("int4", 128, zero_points=True),
    "int4_gptq": int4_groups("int4_gptq", 128, zero_points=True),
    "nvfp4": NVFP4,
    "mxfp4": MXFP4,
}
"""The formats in which any model's weights may be planned, by the names of `WeightType`."""
