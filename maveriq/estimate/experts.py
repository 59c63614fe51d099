"""How long the experts of a layer take on one GPU.

A fused kernel sorts the tokens of a step by their experts, multiplies the rows of each expert, and adds up the results.
It reads the weights of all experts that get a token, so routing decides the time of small steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import msgspec
import numpy as np

from maveriq.domain.gpu_kinds import GpuSheet, NumberFormat
from maveriq.estimate.kernel_bounds import (
    ACTIVATION_BYTES,
    BYTES_PER_WEIGHT,
    Formula,
    computing_us,
    moving_us,
    smooth_max,
)
from maveriq.estimate.log_grid import Array, Sizes

_ROUTING_SKEW = 0.5
_TILE_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad:
    """What the experts of one GPU do in a step.

    Args:
        pairs: pairs of a token and one of its experts, on all GPUs that share the layer: each GPU sorts all of them.
        rows: those whose expert is on this GPU.
        hit: experts of this GPU that get a token at all.
        inner_size: size of the vectors that experts take.
        width: width of an expert's part on this GPU.
        matrices: 3 where experts are gated, else 2.
        whole: whether whole experts are dealt to GPUs (expert parallelism), which other kernels do.
    """

    pairs: Sizes
    rows: Sizes
    hit: Sizes
    inner_size: Sizes
    width: Sizes
    matrices: Sizes = 3
    whole: bool = False

    @property
    def weights_per_expert(self) -> Array:
        """Weights of one expert on this GPU."""
        return np.asarray(self.matrices * np.asarray(self.inner_size, dtype=np.float64) * self.width)

    @property
    def padded_rows(self) -> Array:
        """Rows with those that fill the last tile of each expert, where rows of experts vary as their mean does."""
        each = np.asarray(self.rows, dtype=np.float64) / self.hit
        return np.asarray(self.hit * _TILE_ROWS / -np.expm1(-_TILE_ROWS / each))


class ExpertKernel(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """How well a kernel of experts uses a GPU.

    Args:
        floor_us: time of its launches.
        bandwidth_share: share of the memory's bandwidth that reads weights.
        speed_share: share of the tensor speed that computes.
        padding: tiles of 64 rows by which the rows of an expert are padded.
        expert_us: time that each expert with a token takes beside that.
        pair_passes: times that the vectors of all pairs are read or written, in units of one read and one write.
        pair_width_passes: the same for the intermediate vectors, which are as long as an expert is wide.
        row_passes: the same for the vectors of the rows on this GPU.
    """

    floor_us: float
    bandwidth_share: float
    speed_share: float
    padding: float
    expert_us: float
    pair_passes: float
    pair_width_passes: float
    row_passes: float


USUAL_KERNEL = ExpertKernel(
    floor_us=40.0, bandwidth_share=0.85, speed_share=0.42, padding=1.0, expert_us=0.0,
    pair_passes=1.0, pair_width_passes=0.0, row_passes=0.0,
)  # fmt: skip
"""What kernels of measured GPUs have about in common, for GPUs that were not measured."""


def experts_formula(gpu: GpuSheet, number_format: NumberFormat, kernel: ExpertKernel, load: ExpertLoad) -> Formula:
    """Return the time of the experts of one GPU: choice of experts excluded, sorting by experts included."""
    rows, matrix = np.asarray(load.rows, dtype=np.float64), load.weights_per_expert
    weights_us = moving_us(gpu, load.hit * matrix * BYTES_PER_WEIGHT[number_format])
    computed_rows = rows + kernel.padding * (load.padded_rows - rows)
    multiplied_us = smooth_max(
        weights_us / kernel.bandwidth_share + kernel.expert_us * np.asarray(load.hit),
        computing_us(gpu, number_format, 2.0 * matrix * computed_rows) / kernel.speed_share,
    )
    passed = (
        np.asarray(load.pairs) * (2 * kernel.pair_passes * np.asarray(load.inner_size))
        + np.asarray(load.pairs) * (kernel.pair_width_passes * np.asarray(load.matrices) * load.width)
        + rows * (2 * kernel.row_passes * np.asarray(load.inner_size))
    )
    time_us = kernel.floor_us + multiplied_us + moving_us(gpu, ACTIVATION_BYTES * passed)
    sizes = (rows / np.maximum(load.hit, 1e-9), matrix / 1e6, rows)
    least_us = np.maximum(weights_us, computing_us(gpu, number_format, 2.0 * matrix * rows))
    return Formula(np.asarray(time_us), sizes, least_us)


def experts_hit(experts: int, per_token: int, tokens: Sizes) -> Array:
    """Return how many of `experts` get at least one of `tokens`, each of which picks `per_token` of them.

    The popularity of experts falls with a power of their rank. Measured routing lies between an exponent of 0 and 1.
    """
    counts = np.asarray(tokens, dtype=np.float64)
    return np.asarray((1 - (1 - _picked(experts, per_token)) ** counts[..., None]).sum(axis=-1))


@cache
def _picked(experts: int, per_token: int) -> Array:
    """Return the probability that a token picks each expert."""
    if per_token >= experts:
        return np.ones(experts)
    popularity = np.arange(1, experts + 1, dtype=np.float64) ** -_ROUTING_SKEW
    low, high = 1e-9, 1e9
    for _ in range(60):  # bisection: the probabilities must add up to the experts of a token
        scale = float(np.sqrt(low * high))
        low, high = (scale, high) if (1 - np.exp(-scale * popularity)).sum() < per_token else (low, scale)
    return np.asarray(1 - np.exp(-low * popularity))
