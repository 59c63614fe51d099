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
from typing import TypeAlias

import msgspec
import numpy as np

from maveriq.domain.gpu_kinds import GpuSheet, Link, NumberFormat
from maveriq.errors import InputError
from maveriq.estimate.experts import USUAL_KERNEL, ExpertKernel, ExpertLoad, experts_formula
from maveriq.estimate.kernel_bounds import (
    ACTIVATION_BYTES,
    BYTES_PER_WEIGHT,
    COMPUTED_FORMATS,
    KERNEL_US,
    TILE,
    Formula,
    computing_us,
    moving_us,
    smooth_max,
)
from maveriq.estimate.log_grid import Array, LogGrid, Sizes
from maveriq.files import data_path

# Kernels that can compute experts of a format; engines pick the faster. 8-bit floats with one scale can take a scale
# for each block: on Hopper that is four times as fast as the kernels that were measured with one. Blackwell multiplies
# 4-bit floats of both kinds with 8-bit or smaller activations.
_EXPERT_KERNELS = {
    NumberFormat.FP8: (NumberFormat.FP8, NumberFormat.FP8_BLOCK),
    NumberFormat.MXFP4: (NumberFormat.MXFP4, NumberFormat.NVFP4),
}

_QUANTISE_US = 3.0
_PIPELINE_US = 1.5  # until the first tile of a product has arrived
_USUAL_CLOCK_GHZ = 1.8
_HOPPER = 9.0  # its compute capability
_CACHES = 10  # so many times a GPU's cache are read at nearly the speed of its memory
_QUERY_TILE = 64
_MIXED_SPEED_SHARE, _MIXED_BANDWIDTH_SHARE = 0.6, 0.72  # fitted by scripts/derive_mixed_attention.py
_PCIE_HOP_US = 12.0  # recorded whole models on eight A6000
_PEER_READ_GB_S = 10.0  # reads of all GPUs of a socket together

_AttentionKey: TypeAlias = tuple[str, int, bool]
"""KV format, head size, and whether there is a sliding window."""


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
    return number_format in COMPUTED_FORMATS and number_format is not NumberFormat.BFLOAT16


def gemm_formula(gpu: GpuSheet, number_format: NumberFormat, m: Sizes, n: Sizes, k: Sizes) -> Formula:
    """Return the time of a product of (m, k) activations and (k, n) weights if nothing overlapped."""
    weight_bytes = BYTES_PER_WEIGHT[number_format]
    activation_bytes = weight_bytes if number_format in COMPUTED_FORMATS else ACTIVATION_BYTES
    weights_us = moving_us(gpu, weight_bytes * n * k)
    activations_us = moving_us(gpu, activation_bytes * m * k + ACTIVATION_BYTES * m * n)
    computed_us = computing_us(gpu, number_format, 2.0 * m * n * k)
    time_us = np.asarray(KERNEL_US + weights_us + activations_us + computed_us)
    return Formula(time_us, (m, n, k), np.maximum(weights_us, computed_us))


def decode_attention_formula(
    gpu: GpuSheet, kv_value_bytes: float, sequences: Sizes, context: Sizes, of: Heads
) -> Formula:
    """Return a lower bound of the time in which one new token each of `sequences` attends to `context` tokens."""
    cache_us = moving_us(gpu, 2.0 * sequences * context * of.kv_heads * of.head_size * kv_value_bytes)
    vectors_us = moving_us(gpu, 2.0 * ACTIVATION_BYTES * sequences * of.heads * of.head_size)
    sizes = (context, np.asarray(sequences) * of.kv_heads, of.heads / of.kv_heads)
    return Formula(np.asarray(2 * KERNEL_US + cache_us + vectors_us), sizes, cache_us)


def mixed_attention_us(
    gpu: GpuSheet,
    kv_value_bytes: float,
    sequences: Sizes,
    context: Sizes,
    of: Heads,
    *,
    speed_share: float = _MIXED_SPEED_SHARE,
    bandwidth_share: float = _MIXED_BANDWIDTH_SHARE,
) -> Array:
    """Return the time that decoding sequences add to a call of FlashAttention 2 that also takes chunks of prompts.

    Such a call treats a new token like a chunk: for each head a thread block computes a tile of 64 queries, of which
    one is real, and runs over the whole context alone. Blocks run in waves of one on each multiprocessor, the heads of
    one KV head after another's sequences, so that they share what they read only as far as a wave holds several heads.
    """
    sequences = np.asarray(sequences, dtype=np.float64)
    waves = np.ceil(sequences * of.heads / gpu.multiprocessors)
    columns = np.ceil(np.asarray(context) / TILE) * TILE
    operations = 4.0 * waves * gpu.multiprocessors * _QUERY_TILE * columns * of.head_size
    computed_us = computing_us(gpu, NumberFormat.BFLOAT16, operations) / speed_share
    group = of.heads / of.kv_heads
    repeated = group / np.clip(gpu.multiprocessors / np.maximum(sequences, 1.0), 1.0, group)
    cache_bytes = 2.0 * sequences * context * of.kv_heads * of.head_size * kv_value_bytes
    return np.asarray(np.maximum(computed_us, moving_us(gpu, cache_bytes * repeated) / bandwidth_share))


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
    computed_us = computing_us(gpu, NumberFormat.BFLOAT16, 4.0 * sequences * of.heads * of.head_size * pairs)
    moved = ACTIVATION_BYTES * 2.0 * sequences * chunk * (of.heads + of.kv_heads) * of.head_size
    time_us = np.asarray(2 * KERNEL_US + np.maximum(computed_us / 0.6, moving_us(gpu, moved) / 0.7))
    blocks = sequences * of.heads * np.ceil(np.asarray(chunk) / TILE)
    return Formula(time_us, (2 * pairs / chunk, blocks, of.heads / of.kv_heads), computed_us)


class _Grid(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A table of corrections as stored: hundredths of the natural logarithm, the last axis fastest."""

    axes: list[list[float]]
    log_percent: list[int]
    kernel: str
    rows: int

    def grid(self) -> LogGrid:
        axes = tuple(np.asarray(axis) for axis in self.axes)
        return LogGrid(axes, np.asarray(self.log_percent, dtype=np.float64).reshape([len(axis) for axis in axes]) / 100)


class _Experts(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A kernel of experts and the table of its corrections."""

    formula: ExpertKernel
    corrections: _Grid


class _Curve(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    message_bytes: list[float]
    time_us: list[float]


class OperatorFile(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A file of `maveriq/data/operators`: what was measured of one kind of GPU.

    Args:
        gpu: the kind.
        source: whose measurements they are.
        gemm: corrections by number format, over m, n and k.
        decode_attention: by KV format and head size (`bfloat16/128`, with a sliding window `bfloat16/128/window`), over
            context, sequences times KV heads, and heads for a KV head.
        prefill_attention: the same, over twice the mean context, blocks of 128 queries over all heads, and heads for a
            KV head.
        experts: by number format; kernels that hold a part of each expert (`bfloat16`), and those that hold whole ones
            (`bfloat16/whole`), over rows for each expert hit, millions of weights of an expert, and rows.
        all_reduce: by number of GPUs.
    """

    gpu: str
    source: str
    gemm: dict[NumberFormat, _Grid]
    decode_attention: dict[str, _Grid]
    prefill_attention: dict[str, _Grid]
    experts: dict[str, _Experts]
    all_reduce: dict[str, _Curve]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKernels:
    """What the kernels of an engine do differently from the usual ones.

    Args:
        fp8_block_floor_us: the least time of a product of block-scaled 8-bit floats.
        peer_read_limit_mb: up to this size of messages, more than two GPUs without NVLink add up by reading each
            other's memory, which is slow over PCIe; beyond, and where it is 0, they pass messages in a ring.
        one_hopper_attention: whether chunks of prompts and decoding sequences share a call of attention on Hopper, as
            FlashAttention 3 lets them; else each have a call of their own.
    """

    fp8_block_floor_us: float = 0.0
    peer_read_limit_mb: float = 0.0
    one_hopper_attention: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class UsualEfficiencies:
    """How well kernels use a GPU of which only the data sheet is known.

    Args:
        gemm_floor_us: least time of a product.
        gemm_bandwidth: share of the memory's bandwidth with which a product reads and writes.
        gemm_speed: share of the tensor speed with which it computes.
        decode_floor_us: least time of attention of decoding sequences.
        decode_bandwidth: share of the bandwidth with which it reads the cache.
        decode_block_us: time of a sequence and KV head on one multiprocessor.
        newer_time: what kernels take on Hopper and newer GPUs, which copy to a multiprocessor while it computes,
            over what they would take on older ones.
    """

    gemm_floor_us: float = 2.5
    gemm_bandwidth: float = 0.85
    gemm_speed: float = 0.75
    decode_floor_us: float = 10.0
    decode_bandwidth: float = 0.82
    decode_block_us: float = 3.5
    newer_time: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Operators:
    """Times of operators on one kind of GPU.

    Args:
        gpu: the kind.
        measured: whether its kernels were measured; else formulas with usual efficiencies answer.
        kernels: what an engine's kernels do differently from the usual ones.
        usual: the efficiencies of those formulas.
    """

    gpu: GpuSheet
    measured: bool = False
    kernels: EngineKernels = EngineKernels()
    usual: UsualEfficiencies = UsualEfficiencies()
    _gemm: Mapping[NumberFormat, LogGrid] = field(default_factory=dict)
    _decode: Mapping[_AttentionKey, LogGrid] = field(default_factory=dict)
    _prefill: Mapping[_AttentionKey, LogGrid] = field(default_factory=dict)
    _experts: Mapping[tuple[str, bool], tuple[ExpertKernel, LogGrid]] = field(default_factory=dict)
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
        grid = self._gemm.get(NumberFormat.BFLOAT16) if number_format not in COMPUTED_FORMATS else None
        if grid is not None:  # 16-bit products of weights that are expanded on the way: as efficient at equal bytes
            equal_bytes = np.maximum(np.asarray(k) * BYTES_PER_WEIGHT[number_format] / 2, 1.0)
            return Formula(formula.time_us, (m, n, equal_bytes)).corrected_us(grid)
        return self._usual_gemm_us(number_format, m, n, k)

    def _usual_gemm_us(self, number_format: NumberFormat, m: Sizes, n: Sizes, k: Sizes) -> Array:
        quantise = _QUANTISE_US if quantises_activations(number_format) else 0.0
        weight_bytes = BYTES_PER_WEIGHT[number_format]
        moved = weight_bytes * np.asarray(n, dtype=np.float64) * k + ACTIVATION_BYTES * np.asarray(m) * (
            np.asarray(n) + k
        )
        rows = np.ceil(np.asarray(m) / 16) * 16  # the least that tensor cores multiply
        computed = computing_us(self.gpu, number_format, 2.0 * rows * n * k)
        moved_us = moving_us(self.gpu, moved) / self.usual.gemm_bandwidth + self._slower * _PIPELINE_US
        floor_us = self._slower * (self.usual.gemm_floor_us + quantise)
        return np.asarray(self._newer * (floor_us + smooth_max(moved_us, computed / self.usual.gemm_speed)))

    @property
    def _newer(self) -> float:
        return self.usual.newer_time if self.gpu.compute_capability >= _HOPPER else 1.0

    @property
    def _slower(self) -> float:
        """How much longer what takes a number of clocks takes than on the GPUs that efficiencies come from."""
        return _USUAL_CLOCK_GHZ / self.gpu.clock_ghz

    def decode_attention_us(
        self, kv_format: NumberFormat, sequences: Sizes, context: Sizes, of: Heads, *, windowed: bool = False
    ) -> Array:
        """Return the time in which one new token each of `sequences` attends to `context` tokens.

        With a sliding window, `context` is at most the window; kernels with one are others.
        """
        value_bytes = BYTES_PER_WEIGHT[kv_format]
        grid = _nearest(self._decode, kv_format, of.head_size, windowed=windowed)
        if grid is not None:
            return self._uncached_decode_us(grid, value_bytes, sequences, context, of)
        cache = 2.0 * np.asarray(sequences) * context * of.kv_heads * of.head_size * value_bytes
        blocks = np.asarray(sequences) * of.kv_heads / self.gpu.multiprocessors
        blocks_us = self._slower * self.usual.decode_block_us * blocks
        moved_us = moving_us(self.gpu, cache) / self.usual.decode_bandwidth
        floor_us = self._slower * self.usual.decode_floor_us
        return np.asarray(self._newer * (floor_us + np.sqrt(moved_us**2 + blocks_us**2)))

    def _uncached_decode_us(
        self, grid: LogGrid, value_bytes: float, sequences: Sizes, context: Sizes, of: Heads
    ) -> Array:
        """Return the time of a table where no part of the KV cache is in the GPU's cache.

        The table repeats a kernel on the same data, of which the GPU's cache keeps a part. In an engine the weights of
        a layer run through that cache in between. So the time grows evenly with the context, as the moved bytes do,
        from one launch to the time of a context that makes the GPU's cache too small to matter. It is never below that
        of as many sequences of one token.
        """

        def table_us(number: Sizes, tokens: Sizes) -> Array:
            return decode_attention_formula(self.gpu, value_bytes, number, tokens, of).corrected_us(grid)

        context = np.asarray(context, dtype=np.float64)
        token_bytes = 2.0 * np.asarray(sequences, dtype=np.float64) * of.kv_heads * of.head_size * value_bytes
        far = np.clip(_CACHES * self.gpu.cache_mib * 2**20 / token_bytes, 2.0, float(grid.axes[0][-1]))
        least_us, launch_us, far_us = table_us(sequences, 1.0), table_us(1 / of.kv_heads, 1.0), table_us(sequences, far)
        line_us = launch_us + np.maximum(far_us - launch_us, 0.0) * (context - 1.0) / (far - 1.0)
        return np.where(context < far, np.maximum(line_us, least_us), table_us(sequences, context))

    def mixed_decode_attention_us(
        self, kv_format: NumberFormat, sequences: Sizes, context: Sizes, of: Heads, *, windowed: bool = False
    ) -> Array:
        """Return the time that decoding sequences add to the attention of chunks in the same step."""
        alone_us = self.decode_attention_us(kv_format, sequences, context, of, windowed=windowed)
        if self._has_flash_attention_2:
            mixed_us = mixed_attention_us(self.gpu, BYTES_PER_WEIGHT[kv_format], sequences, context, of)
            return np.asarray(np.maximum(alone_us, mixed_us))
        if self.kernels.one_hopper_attention and int(self.gpu.compute_capability) == _HOPPER:
            # The one call is launched with the chunks.
            launch_us = self.decode_attention_us(kv_format, 1 / of.kv_heads, 1.0, of, windowed=windowed)
            return np.asarray(np.maximum(alone_us - launch_us, 0.0))
        return alone_us

    @property
    def _has_flash_attention_2(self) -> bool:
        """Whether chunks and decoding sequences share a call of FlashAttention 2, as on GPUs without later kernels."""
        return self.gpu.compute_capability < _HOPPER or self.gpu.compute_capability >= 12

    def prefill_attention_us(
        self, kv_format: NumberFormat, chunk: Sizes, past: Sizes, of: Heads, *, window: float = np.inf, chunks: int = 1
    ) -> Array:
        """Return the time in which equal chunks of prompts attend to themselves and to `past` tokens before each."""
        formula = prefill_attention_formula(self.gpu, chunks, chunk, past, of, window=window)
        grid = _nearest(self._prefill, kv_format, of.head_size, windowed=bool(np.isfinite(window)))
        if grid is not None:
            return formula.corrected_us(grid)
        waves = np.maximum(1.0, chunks * of.heads * np.ceil(np.asarray(chunk) / TILE) / self.gpu.multiprocessors)
        return np.asarray(6.0 + formula.time_us + 0.5 * waves)

    def latent_decode_attention_us(
        self, kv_format: NumberFormat, sequences: Sizes, context: Sizes, *, heads: float, kv_rank: int, rope_size: int
    ) -> Array:
        """Return the time in which one new token each of `sequences` attends to the latent vectors of `context` tokens.

        The kernels of latent attention are not corrected by measurements: their tables time them outside of engines.
        """
        cached = np.asarray(sequences, dtype=np.float64) * context
        moved_us = moving_us(self.gpu, cached * (kv_rank + rope_size) * BYTES_PER_WEIGHT[kv_format]) / 0.6
        operations = 2 * cached * max(heads, 16) * (2 * kv_rank + rope_size)  # a tile holds at least 16 heads
        return np.asarray(15 + smooth_max(moved_us, computing_us(self.gpu, NumberFormat.BFLOAT16, operations) / 0.5))

    def experts_us(self, number_format: NumberFormat, load: ExpertLoad) -> Array:
        """Return the time of the experts of one GPU, sorting tokens by them included."""
        times = []
        for stored in _EXPERT_KERNELS.get(number_format, (number_format,)):
            measured = self._experts.get((stored, load.whole)) or self._experts.get((stored, not load.whole))
            if measured is not None:
                kernel, grid = measured
                times.append(experts_formula(self.gpu, stored, kernel, load).corrected_us(grid))
        if times:
            return np.asarray(np.minimum.reduce(times))
        return experts_formula(self.gpu, number_format, USUAL_KERNEL, load).time_us

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
        return np.asarray(kernels * KERNEL_US + moving_us(self.gpu, moved_bytes) / 0.7)


def _ring(gpus: int) -> float:
    return 2 * (gpus - 1) / gpus


def _nearest(
    grids: Mapping[_AttentionKey, LogGrid], kv_format: NumberFormat, head_size: Sizes, *, windowed: bool
) -> LogGrid | None:
    """Return the table of a KV format whose head size is nearest; one with a window for a window if there is any."""
    found = [key for key in grids if key[0] == kv_format]
    if not found:
        return None
    return grids[min(found, key=lambda key: (key[2] != windowed, abs(np.log(key[1] / head_size))))]


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
        _decode=_by_key(read.decode_attention),
        _prefill=_by_key(read.prefill_attention),
        _experts={
            (key.partition("/")[0], key.endswith("/whole")): (stored.formula, stored.corrections.grid())
            for key, stored in read.experts.items()
        },
        _all_reduce={
            int(gpus): (np.asarray(curve.message_bytes), np.asarray(curve.time_us))
            for gpus, curve in read.all_reduce.items()
        },
    )


def _by_key(stored: Mapping[str, _Grid]) -> dict[_AttentionKey, LogGrid]:
    split = {key: key.split("/") for key in stored}
    return {(kv, int(size), bool(window)): stored[key].grid() for key, (kv, size, *window) in split.items()}
