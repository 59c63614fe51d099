"""Dealing layers to pipeline stages, unevenly where free memory is uneven (SPEC 4)."""

from __future__ import annotations

from collections.abc import Sequence

from maveriq.domain.deployment import LayerSplit
from maveriq.units import Bytes


def stage_room(free_bytes: Sequence[Bytes], *, tp: int, layers: int, memory_bytes: Bytes) -> list[int]:
    """Return how many layers each stage can hold.

    Stage i owns the GPUs at positions i*tp to i*tp+tp-1, and each of them holds 1/tp of each of
    its layers. One layer on one GPU takes `memory_bytes / (tp * layers)`; multiplying out keeps
    it in whole numbers.

    Args:
        free_bytes: free memory of the GPUs, stage-major; a whole number of stages.
        tp: GPUs of a stage.
        layers: layers of the whole model.
        memory_bytes: memory of the whole model over all its GPUs.
    """
    stages = (free_bytes[start : start + tp] for start in range(0, len(free_bytes), tp))
    return [max(0, min(stage)) * tp * layers // memory_bytes for stage in stages]


def deal_layers(layers: int, room: Sequence[int]) -> LayerSplit | None:
    """Deal layers one by one to each stage in turn that has room for one more.

    Returns:
        Layers of each stage, or None if some are left over or a stage got none.
    """
    split = [0] * len(room)
    while layers:
        open_stages = [stage for stage, most in enumerate(room) if split[stage] < most]
        if not open_stages:
            return None
        for stage in open_stages[:layers]:
            split[stage] += 1
        layers -= min(layers, len(open_stages))
    return tuple(split) if all(split) else None


def even_split(layers: int, stages: int) -> LayerSplit:
    """Return as even a split as there is; the first stages take the remainder."""
    each, rest = divmod(layers, stages)
    return (each + 1,) * rest + (each,) * (stages - rest)


def shard_bytes(split: LayerSplit, *, tp: int, layers: int, memory_bytes: Bytes) -> tuple[Bytes, ...]:
    """Return the memory of each shard, stage-major, rounded up to whole bytes."""
    return tuple(-(-held * memory_bytes // (tp * layers)) for held in split for _ in range(tp))
