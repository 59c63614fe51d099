"""Placing shards on GPUs by load (SPEC 5).

A placement rule orders the GPUs; `place_shards` puts the largest shard first on the first GPU
in that order that has room, one shard on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from maveriq.domain.cluster import GpuView
from maveriq.errors import InputError
from maveriq.units import Bytes

PlacementRule: TypeAlias = Callable[[Sequence[GpuView]], Sequence[GpuView]]
"""Takes the GPUs in the order of their ids and returns them in the order of preference."""


def least_loaded_first(gpus: Sequence[GpuView]) -> list[GpuView]:
    """Spread: ascending load."""
    return sorted(gpus, key=lambda gpu: gpu.load)


def packing(gpus: Sequence[GpuView]) -> list[GpuView]:
    """Pack: descending load among GPUs under 100 %, then the full ones."""
    return sorted(gpus, key=lambda gpu: (gpu.load >= 1.0, -gpu.load))


def hybrid(threshold: float) -> PlacementRule:
    """Pack up to a load, spread beyond it.

    Descending load among GPUs under `threshold` (0 to 1), then the rest by ascending load.

    Raises:
        InputError: a threshold outside 0 to 1.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"packing threshold must lie between 0 and 1, not {threshold}")

    def order(gpus: Sequence[GpuView]) -> list[GpuView]:
        return sorted(gpus, key=lambda gpu: (0, -gpu.load) if gpu.load < threshold else (1, gpu.load))

    return order


def place_shards(shards: Sequence[Bytes], order: Sequence[GpuView]) -> tuple[int, ...] | None:
    """Return the GPU of each shard, in the order of the shards; None if one finds no room.

    A shard keeps its position, and so its stage and rank, wherever it lies. If the shards fit
    the GPUs in any way at all they fit in this one: a GPU that can hold the largest shard can
    hold any other, so giving one away never spoils the rest.
    """
    taken: dict[int, int] = {}
    free = list(order)
    for position in sorted(range(len(shards)), key=lambda index: -shards[index]):
        gpu = next((gpu for gpu in free if gpu.free_bytes >= shards[position]), None)
        if gpu is None:
            return None
        free.remove(gpu)
        taken[position] = gpu.gpu_id
    return tuple(taken[position] for position in range(len(shards)))
