"""What bytes and operations say about the time of a kernel, and what measurements say about that.

Times are microseconds. Sizes may be numbers or arrays that broadcast together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from maveriq.domain.gpu_kinds import GpuSheet, NumberFormat
from maveriq.domain.weight_formats import FORMATS, fp8_blocks
from maveriq.estimate.log_grid import Array, LogGrid, Sizes

TILE = 128
"""Rows that a thread block of a large kernel computes."""

KERNEL_US = 2.0
"""Time of a kernel that does nothing."""

ACTIVATION_BYTES = 2

BYTES_PER_WEIGHT: Mapping[NumberFormat, float] = {
    number_format: (
        fp8_blocks(TILE, TILE) if number_format is NumberFormat.FP8_BLOCK else FORMATS[number_format]
    ).bytes_per_weight
    for number_format in NumberFormat
}
"""Bytes that a weight takes, its share of the scales included."""

COMPUTED_FORMATS = frozenset((NumberFormat.BFLOAT16, NumberFormat.FP8, NumberFormat.FP8_BLOCK, NumberFormat.NVFP4))
"""Formats whose factors are both in that format; of the others only weights are, and 16 bits are computed in."""


@dataclass(frozen=True, slots=True, eq=False)
class Formula:
    """What bytes and operations say about the time of kernels.

    Args:
        time_us: the time.
        sizes: the sizes by which its corrections are looked up, one for each axis of their table.
        least_us: what no kernel can beat. Measured kernels do where their data were in the cache of the GPU from the
            repetition before; in an engine other layers run between.
    """

    time_us: Array
    sizes: tuple[Sizes, ...]
    least_us: Sizes = 0.0

    def corrected_us(self, grid: LogGrid) -> Array:
        """Return the time, corrected by a table."""
        return np.asarray(np.maximum(self.time_us * grid.ratio(*self.sizes), self.least_us))


def moving_us(gpu: GpuSheet, amount: Sizes) -> Any:
    """Return the time in which the GPU's memory moves so many bytes."""
    return amount / (gpu.bandwidth_gb_s * 1e3)


def computing_us(gpu: GpuSheet, number_format: NumberFormat, operations: Sizes) -> Any:
    """Return the time of so many operations with weights in a format, at the speed of the data sheet."""
    compute_format = number_format if number_format in COMPUTED_FORMATS else NumberFormat.BFLOAT16
    return operations / (gpu.peak_tflops(compute_format) * 1e6)


def smooth_max(first: Sizes, second: Sizes) -> Any:
    """Return about the larger of two times that overlap, more where they are alike."""
    return (np.asarray(first) ** 4 + np.asarray(second) ** 4) ** 0.25
