"""Configurations, layer splits, and plans: a model laid out over GPUs.

Dealing layers to pipeline stages, unevenly where free memory is uneven (SPEC 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.errors import InputError
from maveriq.units import Bytes, gib

LayerSplit: TypeAlias = tuple[int, ...]
"""Layers of each pipeline stage, first stage first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How a model is parallelised and stored.

    Raises:
        InputError: a degree or the batch size is below 1.
    """

    tp: int
    pp: int
    weights: WeightType
    kv: KvType = KvType.NATIVE
    batch_size: int = 1

    def __post_init__(self) -> None:
        for field in ("tp", "pp", "batch_size"):
            if getattr(self, field) < 1:
                raise InputError(f"configuration: {field} must be at least 1, not {getattr(self, field)}")

    @property
    def gpus(self) -> int:
        """GPUs that one deployment takes: TP times PP."""
        return self.tp * self.pp

    def __str__(self) -> str:
        kv = "+kv8" if self.kv is KvType.INT8 else ""
        batch = f" b{self.batch_size}" if self.batch_size > 1 else ""
        return f"TP {self.tp} x PP {self.pp} {self.weights}{kv}{batch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentPlan:
    """A configuration with its layers dealt to stages and its shards put on GPUs.

    `gpu_ids` and `gpu_bytes` are stage-major: stage i owns positions i*TP to i*TP+TP-1, so that
    a shard's position is its identity (stage, rank) wherever it lies. `est_*` are what the
    planning estimator believed, 0 where nobody estimated; they are kept for the records, not used
    to serve.

    Raises:
        InputError: the parts do not belong together (counts, a GPU used twice, an empty stage).
    """

    model: ModelSpec
    configuration: ParallelConfig
    layer_split: LayerSplit
    gpu_ids: tuple[int, ...]
    gpu_bytes: tuple[Bytes, ...]
    est_latency_s: float
    est_memory_bytes: Bytes
    note: str = ""

    def __post_init__(self) -> None:
        cfg, who = self.configuration, f"plan for {self.model.name} ({self.configuration})"
        if len(self.layer_split) != cfg.pp or min(self.layer_split) < 1:
            raise InputError(f"{who}: layer split {self.layer_split} must give each of {cfg.pp} stages a layer")
        if sum(self.layer_split) != self.model.layers:
            raise InputError(f"{who}: layer split {self.layer_split} must add up to {self.model.layers} layers")
        if len(self.gpu_ids) != cfg.gpus or len(set(self.gpu_ids)) != cfg.gpus:
            raise InputError(f"{who}: needs {cfg.gpus} different GPUs, got {self.gpu_ids}")
        if len(self.gpu_bytes) != cfg.gpus or min(self.gpu_bytes) <= 0:
            raise InputError(f"{who}: needs a positive memory for each of {cfg.gpus} shards, got {self.gpu_bytes}")

    @property
    def memory_bytes(self) -> Bytes:
        """Memory over all its GPUs."""
        return sum(self.gpu_bytes)

    def describe_memory(self) -> str:
        """Return the memory of each GPU in GiB, space-separated, in rank order."""
        return " ".join(f"{gib(amount):.4f}" for amount in self.gpu_bytes)


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
        open_stages = [stage for stage, maximum in enumerate(room) if split[stage] < maximum]
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
