"""How long the operators of a decoder take on one GPU: GEMMs, attention, experts, all-reduce, element-wise kernels.

Each operator has a formula, from bytes over bandwidth and operations over speed. Where the GPU's kernels were measured,
the formula is multiplied by a table of corrections (`maveriq/data/operators`, derived by `scripts/derive_operators.py`
from public measurements). Where they were not, a second formula with efficiencies usual among GPUs stands in.
Times are microseconds. Sizes may be numbers or arrays that broadcast together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import msgspec
import numpy as np

from maveriq.domain.gpu_kinds import GpuSheet, Link, NumberFormat
from maveriq.domain.weight_formats import FORMATS, fp8_blocks
from maveriq.errors import InputError
from maveriq.estimate.log_grid import Array, LogGrid, Sizes
from maveriq.files import data_path

_TILE = 128

BYTES_PER_WEIGHT: Mapping[NumberFormat, float] = {
    number_format: (
        fp8_blocks(_TILE, _TILE) if number_format is NumberFormat.FP8_BLOCK else FORMATS[number_format]
    ).bytes_per_weight
    for number_format in NumberFormat
}
"""Bytes that a weight takes, its share of the scales included."""

# Formats whose factors are both in that format; of the others only weights are, and the product is computed in 16 bits.
_COMPUTED = frozenset((NumberFormat.BFLOAT16, NumberFormat.FP8, NumberFormat.FP8_BLOCK, NumberFormat.NVFP4))

# Kernels that can compute experts of a format; engines pick the faster. 8-bit floats with one scale can take a scale
# for each block: on Hopper that is four times as fast as the kernels that were measured with one. Blackwell multiplies
# 4-bit floats of both kinds with 8-bit or smaller activations.
_EXPERT_KERNELS = {
    NumberFormat.FP8: (NumberFormat.FP8, NumberFormat.FP8_BLOCK),
    NumberFormat.MXFP4: (NumberFormat.MXFP4, NumberFormat.NVFP4),
}

_ACTIVATION_BYTES = 2
_KERNEL_US = 2.0
_QUANTISE_US = 3.0
_ROUTING_SKEW = 0.5
_PCIE_HOP_US, _PEER_READ_GB_S = (
    12.0,
    10.0,
)  # recorded whole models on eight A6000; reads of all GPUs of a socket together


@dataclass(frozen=True, slots=True, eq=False)
class Formula:
    """What bytes and operations say about the time of kernels.

    Args:
        time_us: the time.
        sizes: the sizes by which its corrections are looked up, one for each axis of their table.
    """

    time_us: Array
    sizes: tuple[Sizes, ...]

    def corrected_us(self, grid: LogGrid) -> Array:
        """Return the time, corrected by a table."""
        return np.asarray(self.time_us * grid.ratio(*self.sizes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The attention heads of one GPU.

    Args:
        heads: query heads.
        kv_heads: KV heads.
        head_size: values of a head.
    """

    heads: Sizes
    kv_heads: Sizes
    head_size: Sizes


def quantises_activations(number_format: NumberFormat) -> bool:
    """Return whether products in a format take activations of that format, which are quantised before."""
    return number_format in _COMPUTED and number_format is not NumberFormat.BFLOAT16


def gemm_formula(gpu: GpuSheet, number_format: NumberFormat, m: Sizes, n: Sizes, k: Sizes) -> Formula:
    """Return a lower bound of the time of a product of (m, k) activations and (k, n) weights."""
    weight_bytes = BYTES_PER_WEIGHT[number_format]
    activation_bytes = weight_bytes if number_format in _COMPUTED else _ACTIVATION_BYTES
    moved = activation_bytes * m * k + weight_bytes * n * k + _ACTIVATION_BYTES * m * n
    computed_us = _computed_us(gpu, _compute_format(number_format), 2.0 * m * n * k)
    return Formula(np.asarray(_KERNEL_US + _moved_us(gpu, moved) + computed_us), (m, n, k))


def decode_attention_formula(
    gpu: GpuSheet, kv_value_bytes: float, sequences: Sizes, context: Sizes, of: Heads
) -> Formula:
    """Return a lower bound of the time in which one new token each of `sequences` attends to `context` tokens."""
    cache = 2.0 * sequences * context * of.kv_heads * of.head_size * kv_value_bytes
    moved_us = _moved_us(gpu, cache + 2.0 * _ACTIVATION_BYTES * sequences * of.heads * of.head_size)
    sizes = (context, np.asarray(sequences) * of.kv_heads, of.heads / of.kv_heads)
    return Formula(np.asarray(2 * _KERNEL_US + moved_us), sizes)


def attended_pairs(chunk: Sizes, past: Sizes, window: Sizes = np.inf) -> Array:
    """Return the pairs of a query and a key or value in a chunk of a prompt behind `past` tokens.

    A query attends to itself and what lies before it, at most to the last `window` tokens.
    """
    chunk, past = np.asarray(chunk, dtype=np.float64), np.asarray(past, dtype=np.float64)
    growing = np.clip(window - past, 0.0, chunk)  # queries that still see everything
    full = growing * past + growing * (growing + 1) / 2
    bounded = np.minimum(window, 1e18)  # infinity times no query is not a number
    return np.asarray(full + (chunk - growing) * bounded)


def prefill_attention_formula(
    gpu: GpuSheet, sequences: Sizes, chunk: Sizes, past: Sizes, of: Heads, *, window: Sizes = np.inf
) -> Formula:
    """Return about the time in which `sequences` chunks attend to themselves and to `past` tokens before each."""
    pairs = attended_pairs(chunk, past, window)
    computed_us = _computed_us(gpu, NumberFormat.BFLOAT16, 4.0 * sequences * of.heads * of.head_size * pairs)
    moved = _ACTIVATION_BYTES * 2.0 * sequences * chunk * (of.heads + of.kv_heads) * of.head_size
    time_us = np.asarray(2 * _KERNEL_US + np.maximum(computed_us / 0.6, _moved_us(gpu, moved) / 0.7))
    blocks = sequences * of.heads * np.ceil(np.asarray(chunk) / _TILE)
    return Formula(time_us, (2 * pairs / chunk, blocks, of.heads / of.kv_heads))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad:
    """What the experts of one GPU do in a step.

    Args:
        rows: pairs of a token and one of its experts on this GPU.
        hit: experts of this GPU that get a token at all.
        experts: experts of this GPU.
        inner_size: size of the vectors that experts take.
        width: width of an expert's part on this GPU.
        matrices: 3 where experts are gated, else 2.
    """

    rows: Sizes
    hit: Sizes
    experts: Sizes
    inner_size: Sizes
    width: Sizes
    matrices: Sizes = 3

    @property
    def weights_per_expert(self) -> Array:
        """Weights of one expert on this GPU."""
        return np.asarray(self.matrices * np.asarray(self.inner_size, dtype=np.float64) * self.width)


def experts_formula(gpu: GpuSheet, number_format: NumberFormat, load: ExpertLoad) -> Formula:
    """Return a lower bound of the time of the experts of one GPU, routing included."""
    rows, matrix = np.asarray(load.rows, dtype=np.float64), load.weights_per_expert
    weights_us = _moved_us(gpu, load.hit * matrix * BYTES_PER_WEIGHT[number_format])
    computed_us = _computed_us(gpu, _compute_format(number_format), 2.0 * matrix * rows)
    moved_us = _moved_us(gpu, 2.0 * _ACTIVATION_BYTES * rows * load.inner_size)
    sizes = (rows, rows / np.maximum(load.hit, 1e-9), matrix / 1e6, load.experts)
    return Formula(np.asarray(5 * _KERNEL_US + weights_us + computed_us + moved_us), sizes)


def experts_hit(experts: int, per_token: int, tokens: Sizes) -> Array:
    """Return how many of `experts` get at least one of `tokens`, each of which picks `per_token` of them.

    The popularity of experts falls with a power of their rank. Measured routing lies between an exponent of 0 and 1;
    0.5 fits kernels with balanced and with skewed routing about equally well.
    """
    popularity = np.arange(1, experts + 1, dtype=np.float64) ** -_ROUTING_SKEW
    low, high = 1e-9, 1e9
    for _ in range(60):  # bisection: the probabilities must add up to the experts of a token
        scale = float(np.sqrt(low * high))
        low, high = (scale, high) if (1 - np.exp(-scale * popularity)).sum() < per_token else (low, scale)
    picked = 1 - np.exp(-low * popularity) if per_token < experts else np.ones(experts)
    counts = np.asarray(tokens, dtype=np.float64)
    return np.asarray((1 - (1 - picked) ** counts[..., None]).sum(axis=-1))


def _compute_format(number_format: NumberFormat) -> NumberFormat:
    return number_format if number_format in _COMPUTED else NumberFormat.BFLOAT16


def _moved_us(gpu: GpuSheet, amount: Sizes) -> Any:
    return amount / (gpu.bandwidth_gb_s * 1e3)


def _computed_us(gpu: GpuSheet, number_format: NumberFormat, operations: Sizes) -> Any:
    return operations / (gpu.peak_tflops(number_format) * 1e6)


class _Grid(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A table of corrections as stored: hundredths of the natural logarithm, the last axis fastest."""

    axes: list[list[float]]
    log_percent: list[int]
    kernel: str
    rows: int

    def grid(self) -> LogGrid:
        axes = tuple(np.asarray(axis) for axis in self.axes)
        return LogGrid(axes, np.asarray(self.log_percent, dtype=np.float64).reshape([len(axis) for axis in axes]) / 100)


class _Curve(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    message_bytes: list[float]
    time_us: list[float]


class OperatorFile(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A file of `maveriq/data/operators`: what was measured of one kind of GPU.

    Args:
        gpu: the kind.
        source: whose measurements they are.
        gemm: corrections by number format, over m, n and k.
        decode_attention: by KV format and head size (`bfloat16/128`), over context, sequences times KV heads, and heads
            for a KV head.
        prefill_attention: the same, over twice the mean context, blocks of 128 queries over all heads, and heads for a
            KV head.
        experts: by number format, over rows, rows for each expert hit, millions of weights of an expert, and experts.
        all_reduce: by number of GPUs.
    """

    gpu: str
    source: str
    gemm: dict[NumberFormat, _Grid]
    decode_attention: dict[str, _Grid]
    prefill_attention: dict[str, _Grid]
    experts: dict[NumberFormat, _Grid]
    all_reduce: dict[str, _Curve]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKernels:
    """What the kernels of an engine do differently from the usual ones.

    Args:
        fp8_block_floor_us: the least time of a product of block-scaled 8-bit floats.
        peer_read_limit_mb: up to this size of messages, more than two GPUs without NVLink add up by reading each
            other's memory, which is slow over PCIe; beyond, and where it is 0, they pass messages in a ring.
    """

    fp8_block_floor_us: float = 0.0
    peer_read_limit_mb: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Operators:
    """Times of operators on one kind of GPU.

    Args:
        gpu: the kind.
        measured: whether its kernels were measured; else formulas with usual efficiencies answer.
        kernels: what an engine's kernels do differently from the usual ones.
    """

    gpu: GpuSheet
    measured: bool = False
    kernels: EngineKernels = EngineKernels()
    _gemm: Mapping[NumberFormat, LogGrid] = field(default_factory=dict)
    _decode: Mapping[tuple[str, int], LogGrid] = field(default_factory=dict)
    _prefill: Mapping[tuple[str, int], LogGrid] = field(default_factory=dict)
    _experts: Mapping[NumberFormat, LogGrid] = field(default_factory=dict)
    _all_reduce: Mapping[int, tuple[Array, Array]] = field(default_factory=dict)

    def gemm_us(self, number_format: NumberFormat, m: Sizes, n: Sizes, k: Sizes) -> Array:
        """Return the time of a product of (m, k) activations and (k, n) weights."""
        if number_format is NumberFormat.FP8_BLOCK:
            # Tables of block-scaled kernels have launch floors that today's engines do not show.
            return np.maximum(1.1 * self.gemm_us(NumberFormat.FP8, m, n, k), self.kernels.fp8_block_floor_us)
        formula = gemm_formula(self.gpu, number_format, m, n, k)
        grid = self._gemm.get(number_format)
        if grid is not None:
            return formula.corrected_us(grid)
        grid = self._gemm.get(NumberFormat.BFLOAT16) if number_format not in _COMPUTED else None
        if grid is not None:  # 16-bit products of weights that are expanded on the way: as efficient at equal bytes
            equal_bytes = np.maximum(np.asarray(k) * BYTES_PER_WEIGHT[number_format] / 2, 1.0)
            return Formula(formula.time_us, (m, n, equal_bytes)).corrected_us(grid)
        return self._usual_gemm_us(number_format, m, n, k)

    def _usual_gemm_us(self, number_format: NumberFormat, m: Sizes, n: Sizes, k: Sizes) -> Array:
        quantise = _QUANTISE_US if quantises_activations(number_format) else 0.0
        weight_bytes = BYTES_PER_WEIGHT[number_format]
        moved = weight_bytes * np.asarray(n, dtype=np.float64) * k + _ACTIVATION_BYTES * np.asarray(m) * (
            np.asarray(n) + k
        )
        rows = np.ceil(np.asarray(m) / 16) * 16  # the least that tensor cores multiply
        computed = _computed_us(self.gpu, _compute_format(number_format), 2.0 * rows * n * k)
        return np.asarray(2.5 + quantise + _smooth_max(_moved_us(self.gpu, moved) / 0.85 + 1.5, computed / 0.75))

    def decode_attention_us(self, kv_format: NumberFormat, sequences: Sizes, context: Sizes, of: Heads) -> Array:
        """Return the time in which one new token each of `sequences` attends to `context` tokens."""
        value_bytes = BYTES_PER_WEIGHT[kv_format]
        grid = _nearest(self._decode, kv_format, of.head_size)
        if grid is not None:
            return decode_attention_formula(self.gpu, value_bytes, sequences, context, of).corrected_us(grid)
        cache = 2.0 * np.asarray(sequences) * context * of.kv_heads * of.head_size * value_bytes
        blocks_us = 3.5 * np.asarray(sequences) * of.kv_heads / self.gpu.multiprocessors
        return np.asarray(10.0 + np.sqrt((_moved_us(self.gpu, cache) / 0.82) ** 2 + blocks_us**2))

    def prefill_attention_us(
        self, kv_format: NumberFormat, chunk: Sizes, past: Sizes, of: Heads, *, window: float = np.inf
    ) -> Array:
        """Return the time in which a chunk of a prompt attends to itself and to `past` tokens before it."""
        formula = prefill_attention_formula(self.gpu, 1, chunk, past, of, window=window)
        grid = _nearest(self._prefill, kv_format, of.head_size)
        if grid is not None:
            return formula.corrected_us(grid)
        waves = np.maximum(1.0, of.heads * np.ceil(np.asarray(chunk) / _TILE) / self.gpu.multiprocessors)
        return np.asarray(6.0 + formula.time_us + 0.5 * waves)

    def latent_decode_attention_us(
        self, kv_format: NumberFormat, sequences: Sizes, context: Sizes, *, heads: float, kv_rank: int, rope_size: int
    ) -> Array:
        """Return the time in which one new token each of `sequences` attends to the latent vectors of `context` tokens.

        The kernels of latent attention are not corrected by measurements: their tables time them outside of engines.
        """
        cached = np.asarray(sequences, dtype=np.float64) * context
        moved_us = _moved_us(self.gpu, cached * (kv_rank + rope_size) * BYTES_PER_WEIGHT[kv_format]) / 0.6
        operations = 2 * cached * max(heads, 16) * (2 * kv_rank + rope_size)  # a tile holds at least 16 heads
        return np.asarray(15 + _smooth_max(moved_us, _computed_us(self.gpu, NumberFormat.BFLOAT16, operations) / 0.5))

    def experts_us(self, number_format: NumberFormat, load: ExpertLoad) -> Array:
        """Return the time of the experts of one GPU, routing included."""
        measured = [
            stored for stored in _EXPERT_KERNELS.get(number_format, (number_format,)) if stored in self._experts
        ]
        if measured:
            times = [experts_formula(self.gpu, kind, load).corrected_us(self._experts[kind]) for kind in measured]
            return np.asarray(np.minimum.reduce(times))
        matrix = load.weights_per_expert
        weights_us = _moved_us(self.gpu, load.hit * matrix * BYTES_PER_WEIGHT[number_format]) / 0.85
        padded = load.rows + np.asarray(load.hit) * 64.0
        computed_us = _computed_us(self.gpu, _compute_format(number_format), 2.0 * matrix * padded) / 0.42
        moved_us = 2.0 * _moved_us(self.gpu, 2.0 * load.rows * load.inner_size)
        return np.asarray(40.0 + _smooth_max(weights_us, computed_us) + moved_us)

    def all_reduce_us(self, gpus: int, message_bytes: Sizes) -> Array:
        """Return the time in which the GPUs of a tensor-parallel group add up their partial results."""
        if gpus == 1:
            return np.zeros_like(np.asarray(message_bytes, dtype=np.float64))
        sizes = np.maximum(np.asarray(message_bytes, dtype=np.float64), 1.0)
        if self._all_reduce:
            measured = min(self._all_reduce, key=lambda count: abs(count - gpus))
            axis, times = self._all_reduce[measured]
            time_us = np.exp(np.interp(np.log(sizes), np.log(axis), np.log(times)))
            beyond = np.maximum(sizes / axis[-1], 1.0)
            return np.asarray(time_us * beyond * _ring(gpus) / _ring(measured))
        if self.gpu.link is Link.NVLINK:
            return np.asarray(2 + 2.0 * (gpus - 1) + _ring(gpus) * sizes / (0.35 * self.gpu.link_gb_s * 1e3))
        # A node's GPUs hang on two sockets; between these, hops take twice as long and reads are half as fast.
        distance = 1 if gpus <= self.gpu.gpus_per_node / 2 else 2
        ring_us = _ring(gpus) * sizes / (0.31 * self.gpu.link_gb_s * 1e3)
        read_us = 2 * (gpus - 1) * sizes * distance / (_PEER_READ_GB_S * 1e3)
        by_reading = (sizes <= 1e6 * self.kernels.peer_read_limit_mb) & (gpus > 2)
        return np.asarray(2 + _PCIE_HOP_US * distance * (gpus - 1) + np.where(by_reading, read_us, ring_us))

    def elementwise_us(self, kernels: float, moved_bytes: Sizes) -> Array:
        """Return the time of `kernels` kernels that move `moved_bytes` bytes: norms, rotations, activations."""
        return np.asarray(kernels * _KERNEL_US + _moved_us(self.gpu, moved_bytes) / 0.7)


def _ring(gpus: int) -> float:
    return 2 * (gpus - 1) / gpus


def _smooth_max(first: Sizes, second: Sizes) -> Any:
    return (np.asarray(first) ** 4 + np.asarray(second) ** 4) ** 0.25


def _nearest(grids: Mapping[tuple[str, int], LogGrid], kv_format: NumberFormat, head_size: Sizes) -> LogGrid | None:
    """Return the table of a KV format whose head size is nearest."""
    sizes = [size for kv, size in grids if kv == kv_format]
    if not sizes:
        return None
    return grids[kv_format, min(sizes, key=lambda size: abs(np.log(size / head_size)))]


@cache
def operators_of(gpu: GpuSheet, kernels: EngineKernels = EngineKernels()) -> Operators:
    """Return the operators of a kind of GPU, from its file in `maveriq/data/operators` where there is one.

    Args:
        gpu: the kind.
        kernels: what the engine's kernels do differently from the usual ones.

    Raises:
        InputError: the file is damaged.
    """
    path = data_path("operators", f"{gpu.name}.json")
    if not path.is_file():
        return Operators(gpu=gpu, kernels=kernels)
    try:
        read = msgspec.json.decode(path.read_bytes(), type=OperatorFile)
    except msgspec.DecodeError as error:
        raise InputError(f"operator table {str(path)!r}: {error}") from None
    return Operators(
        gpu=gpu,
        measured=True,
        kernels=kernels,
        _gemm={key: stored.grid() for key, stored in read.gemm.items()},
        _decode=_by_head_size(read.decode_attention),
        _prefill=_by_head_size(read.prefill_attention),
        _experts={key: stored.grid() for key, stored in read.experts.items()},
        _all_reduce={
            int(gpus): (np.asarray(curve.message_bytes), np.asarray(curve.time_us))
            for gpus, curve in read.all_reduce.items()
        },
    )


def _by_head_size(stored: Mapping[str, _Grid]) -> dict[tuple[str, int], LogGrid]:
    return {(kv, int(size)): grid.grid() for key, grid in stored.items() for kv, _, size in [key.partition("/")]}
