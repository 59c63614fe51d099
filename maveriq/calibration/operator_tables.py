"""Fits the tables of corrections of `maveriq.estimate.operators` to measured times of kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from maveriq.calibration.log_grid_fit import fit_log_grid
from maveriq.domain.gpu_kinds import GpuSheet, NumberFormat
from maveriq.estimate.log_grid import Array, LogGrid
from maveriq.estimate.operators import (
    ExpertLoad,
    attended_pairs,
    decode_attention_formula_us,
    expert_sizes,
    experts_formula_us,
    gemm_formula_us,
    prefill_attention_formula_us,
)


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
_SMOOTH = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Shapes of measured attention kernels, one element a measurement: all of one KV format and head size."""

    sequences: Array
    tokens: Array
    heads: Array
    kv_heads: Array
    window: Array
    head_size: int


def fit_gemm(gpu: GpuSheet, number_format: NumberFormat, m: Array, n: Array, k: Array, time_us: Array) -> LogGrid:
    """Fit the corrections of products of (m, k) activations and (k, n) weights."""
    formula = gemm_formula_us(gpu, number_format, m, n, k)
    axes = (_GEMM_ROWS, _GEMM_COLUMNS, _GEMM_COLUMNS)
    return fit_log_grid(axes, (m, n, k), np.log(time_us / formula), smoothness=(_SMOOTH,) * 3)


def fit_decode_attention(gpu: GpuSheet, kv_value_bytes: float, shape: AttentionShape, time_us: Array) -> LogGrid:
    """Fit the corrections of decode attention; `shape.tokens` is the context, which a window clips."""
    seen = np.minimum(shape.tokens, shape.window)
    formula = decode_attention_formula_us(
        gpu, kv_value_bytes, shape.sequences, seen, shape.heads, shape.kv_heads, shape.head_size
    )
    return fit_log_grid(
        (_CONTEXT, _DECODE_BLOCKS, _DECODE_GROUP),
        (seen, shape.sequences * shape.kv_heads, shape.heads / shape.kv_heads),
        np.log(time_us / formula),
        smoothness=(_SMOOTH,) * 3,
    )


def fit_prefill_attention(gpu: GpuSheet, shape: AttentionShape, time_us: Array) -> LogGrid:
    """Fit the corrections of prefill attention; `shape.tokens` is the length of each prompt."""
    pairs = np.asarray(
        [attended_pairs(tokens, 0.0, window) for tokens, window in zip(shape.tokens, shape.window, strict=True)]
    )
    formula = prefill_attention_formula_us(
        gpu, shape.sequences, shape.tokens, pairs, shape.heads, shape.kv_heads, shape.head_size
    )
    blocks = shape.sequences * shape.heads * np.ceil(shape.tokens / 128)
    return fit_log_grid(
        (_PREFILL_CONTEXT, _PREFILL_BLOCKS, _PREFILL_GROUP),
        (2 * pairs / shape.tokens, blocks, shape.heads / shape.kv_heads),
        np.log(time_us / formula),
        smoothness=(_SMOOTH,) * 3,
    )


def fit_experts(gpu: GpuSheet, number_format: NumberFormat, load: ExpertLoad, time_us: Array) -> LogGrid:
    """Fit the corrections of experts."""
    formula = experts_formula_us(gpu, number_format, load)
    return fit_log_grid(
        (_EXPERT_ROWS, _ROWS_AN_EXPERT, _EXPERT_MILLIONS, _EXPERTS),
        [np.broadcast_to(np.asarray(size, dtype=np.float64), time_us.shape) for size in expert_sizes(load)],
        np.log(time_us / formula),
        smoothness=(0.1, 0.1, 0.2, 0.2),
    )
