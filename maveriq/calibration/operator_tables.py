"""Fits tables of corrections, and formulas of experts, to measured times of kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares

from maveriq.calibration.log_grid_fit import fit_log_grid
from maveriq.domain.gpu_kinds import GpuSheet, NumberFormat
from maveriq.estimate.experts import ExpertKernel, ExpertLoad, experts_formula
from maveriq.estimate.kernel_bounds import Formula
from maveriq.estimate.log_grid import Array, LogGrid

_OUTLIER = 0.1
_EXPERT_SAMPLE = 4000
_EXPERT_BOUNDS = {
    "floor_us": (2.0, 25.0, 150.0), "bandwidth_share": (0.1, 0.88, 1.0), "speed_share": (0.05, 0.5, 1.0),
    "padding": (0.001, 1.5, 3.0), "expert_us": (0.001, 0.08, 2.0), "pair_passes": (0.001, 1.7, 6.0),
    "pair_width_passes": (0.001, 3.5, 6.0), "row_passes": (0.001, 0.1, 6.0),
}  # fmt: skip
"""For each constant of `ExpertKernel` the least value, where a fit starts, and the largest."""
_LOAD_SIZES = ("pairs", "rows", "hit", "inner_size", "width", "matrices")


def _axis(*sizes: float) -> Array:
    return np.asarray(sizes, dtype=np.float64)


_GEMM_ROWS = _axis(
    1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 257, 512, 513, 768, 769, 1024, 1025, 1280, 1536, 2048, 4096, 8192,
    16384, 32768
)  # fmt: skip
_GEMM_COLUMNS = _axis(128, 512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 65536)
_CONTEXT = _axis(1, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_DECODE_BLOCKS = _axis(1, 4, 16, 64, 128, 256, 512, 1024, 4096, 16384)
_DECODE_GROUP = _axis(1, 2, 4, 8, 16, 64)
_PREFILL_CONTEXT = _axis(1, 32, 128, 512, 1024, 2048, 4096, 8192, 16384)
_PREFILL_BLOCKS = _axis(1, 16, 64, 128, 256, 512, 1024, 2048, 8192, 65536)
_PREFILL_GROUP = _axis(1, 4, 16, 64)
_ROWS_AN_EXPERT = _axis(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
_EXPERT_MILLIONS = _axis(0.05, 0.3, 1.5, 6, 24, 200)
_EXPERT_ROWS = _axis(0.25, 2, 8, 32, 128, 512, 2048, 8192, 65536, 524288)


@dataclass(frozen=True, slots=True)
class Table:
    """The shape of a table of corrections.

    Args:
        axes: the sizes at its grid points; what they are says `maveriq.estimate.operators.OperatorFile`.
        smoothness, pull: see `maveriq.calibration.log_grid_fit.fit_log_grid`.
    """

    axes: tuple[Array, ...]
    smoothness: tuple[float, ...]
    pull: float = 1e-3


GEMM = Table((_GEMM_ROWS, _GEMM_COLUMNS, _GEMM_COLUMNS), (0.3, 1.0, 1.0))
DECODE_ATTENTION = Table((_CONTEXT, _DECODE_BLOCKS, _DECODE_GROUP), (0.05, 0.05, 0.05))
PREFILL_ATTENTION = Table((_PREFILL_CONTEXT, _PREFILL_BLOCKS, _PREFILL_GROUP), (0.05, 0.05, 0.05))
EXPERTS = Table((_ROWS_AN_EXPERT, _EXPERT_MILLIONS, _EXPERT_ROWS), (0.1, 0.3, 0.2), pull=1.0)


def fit_corrections(table: Table, formula: Formula, time_us: Array) -> LogGrid:
    """Fit the corrections of a formula to measured times, one element a measurement."""
    sizes = [np.broadcast_to(np.asarray(size, dtype=np.float64), time_us.shape) for size in formula.sizes]
    return fit_log_grid(
        table.axes, sizes, np.log(time_us / formula.time_us), smoothness=table.smoothness, pull=table.pull
    )


def fit_expert_kernel(gpu: GpuSheet, number_format: NumberFormat, load: ExpertLoad, time_us: Array) -> ExpertKernel:
    """Fit the formula of a kernel of experts to measured times, one element a measurement.

    Shares of the GPU's bandwidth and speed stay below one, so that a fit cannot lose its memory term.
    """
    names = ExpertKernel.__struct_fields__
    least, start, most = np.log(np.asarray([_EXPERT_BOUNDS[name] for name in names])).T
    sample = np.random.default_rng(0).permutation(len(time_us))[:_EXPERT_SAMPLE]
    sampled = replace(load, **{name: getattr(load, name)[sample] for name in _LOAD_SIZES})
    logarithms = np.log(time_us[sample])

    def kernel_of(parameters: Array) -> ExpertKernel:
        return ExpertKernel(**dict(zip(names, np.exp(parameters).tolist(), strict=True)))

    def errors(parameters: Array) -> Array:
        formula = experts_formula(gpu, number_format, kernel_of(parameters), sampled)
        return np.asarray(np.log(formula.time_us) - logarithms)

    found = least_squares(errors, start, bounds=(least, most), loss="soft_l1", f_scale=_OUTLIER)
    return kernel_of(np.asarray(found.x))
