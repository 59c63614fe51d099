"""Fits the tables of corrections of `maveriq.estimate.operators` to measured times of kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from maveriq.calibration.log_grid_fit import fit_log_grid
from maveriq.estimate.log_grid import Array, LogGrid
from maveriq.estimate.operators import Formula


def _axis(*sizes: float) -> Array:
    return np.asarray(sizes, dtype=np.float64)


_GEMM_ROWS = _axis(
    1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192, 16384, 32768
)  # fmt: skip
_GEMM_COLUMNS = _axis(128, 512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 65536)
_CONTEXT = _axis(1, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_DECODE_BLOCKS = _axis(1, 4, 16, 64, 128, 256, 512, 1024, 4096, 16384)
_DECODE_GROUP = _axis(1, 2, 4, 8, 16, 64)
_PREFILL_CONTEXT = _axis(1, 32, 128, 512, 1024, 2048, 4096, 8192, 16384)
_PREFILL_BLOCKS = _axis(1, 16, 64, 128, 256, 512, 1024, 2048, 8192, 65536)
_PREFILL_GROUP = _axis(1, 4, 16, 64)
_EXPERT_ROWS = _axis(0.25, 2, 8, 32, 128, 512, 2048, 8192, 65536, 524288)
_ROWS_AN_EXPERT = _axis(1, 2, 8, 32, 128, 512, 4096)
_EXPERT_MILLIONS = _axis(0.05, 0.3, 1.5, 6, 24, 200)
_EXPERTS = _axis(1, 8, 64, 512)


@dataclass(frozen=True, slots=True)
class Table:
    """The shape of a table of corrections.

    Args:
        axes: the sizes at its grid points; what they are says `maveriq.estimate.operators.OperatorFile`.
        smoothness: see `maveriq.calibration.log_grid_fit.fit_log_grid`.
    """

    axes: tuple[Array, ...]
    smoothness: tuple[float, ...]


GEMM = Table((_GEMM_ROWS, _GEMM_COLUMNS, _GEMM_COLUMNS), (0.05, 0.05, 0.05))
DECODE_ATTENTION = Table((_CONTEXT, _DECODE_BLOCKS, _DECODE_GROUP), (0.05, 0.05, 0.05))
PREFILL_ATTENTION = Table((_PREFILL_CONTEXT, _PREFILL_BLOCKS, _PREFILL_GROUP), (0.05, 0.05, 0.05))
EXPERTS = Table((_EXPERT_ROWS, _ROWS_AN_EXPERT, _EXPERT_MILLIONS, _EXPERTS), (0.1, 0.1, 0.2, 0.2))


def fit_corrections(table: Table, formula: Formula, time_us: Array) -> LogGrid:
    """Fit the corrections of a formula to measured times, one element a measurement."""
    sizes = [np.broadcast_to(np.asarray(size, dtype=np.float64), time_us.shape) for size in formula.sizes]
    return fit_log_grid(table.axes, sizes, np.log(time_us / formula.time_us), smoothness=table.smoothness)
