"""What a placement search is given: GPUs, models with their profiles, and the demand expected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from maveriq.domain.forecast import DemandForecast
from maveriq.domain.hardware import Cluster
from maveriq.errors import InputError


class GroupShape(NamedTuple):
    """How the GPUs of a group are used: tensor parallel within `pp` pipeline stages."""

    tp: int
    pp: int

    @property
    def gpus(self) -> int:
        """GPUs of a group of this shape."""
        return self.tp * self.pp


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProfile:
    """A model under one shape: seconds of one request on each stage, bytes on each GPU of a stage.

    `batched_latency_s` has the same per batch size above 1, for the simulator that batches.

    Raises:
        InputError: no stage, stages that do not belong together, a time or size that cannot be.
    """

    stage_latency_s: tuple[float, ...]
    stage_weight_bytes: tuple[float, ...]
    batched_latency_s: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stages = len(self.stage_latency_s)
        if not stages or {stages, *map(len, self.batched_latency_s.values())} != {len(self.stage_weight_bytes)}:
            raise InputError(
                f"profile: {stages} stage latencies and {len(self.stage_weight_bytes)} stage weights must be as many"
            )
        if not all(math.isfinite(value) and value >= 0 for value in self.stage_latency_s):
            raise InputError(f"profile: stage latencies must be finite and not negative, not {self.stage_latency_s}")
        if not all(math.isfinite(value) and value > 0 for value in self.stage_weight_bytes):
            raise InputError(f"profile: stage weights must be finite and positive, not {self.stage_weight_bytes}")

    def latency_s(self, batch_size: int) -> tuple[float, ...]:
        """Return the seconds of each stage for a batch.

        Raises:
            InputError: that batch size was never measured.
        """
        if batch_size == 1:
            return self.stage_latency_s
        if batch_size not in self.batched_latency_s:
            raise InputError(f"profile: no latency for batches of {batch_size}, which the batching simulator needs")
        return self.batched_latency_s[batch_size]

    @property
    def slowest_stage_s(self) -> float:
        """What bounds the throughput of the pipeline."""
        return max(self.stage_latency_s)

    @property
    def gpu_bytes(self) -> float:
        """What the fullest GPU holds; the memory rule goes by it."""
        return max(self.stage_weight_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """A model under every shape in which it can run; a missing shape cannot."""

    shapes: Mapping[GroupShape, StageProfile]

    def gpu_bytes(self, shape: GroupShape) -> float:
        """Return what one GPU of a group must hold, infinite where the model cannot run so."""
        profile = self.shapes.get(shape)
        return math.inf if profile is None else profile.gpu_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementModel:
    """A model to place. `rate_per_s` is its mean rate, which only bucketing asks for."""

    name: str
    profile: ModelProfile
    rate_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementProblem:
    """A cluster of equal GPUs, what to place on it, and for which requests.

    Args:
        gpus: how many there are.
        gpus_per_node: a group larger than a node takes whole nodes.
        memory_bytes: what one GPU can give to models.
        models: in the order that ties go by.
        demand: the requests; its `models` are those of the problem, in their order.

    Raises:
        InputError: no GPU, no memory, no model, or a demand for other models.
    """

    gpus: int
    gpus_per_node: int
    memory_bytes: float
    models: tuple[PlacementModel, ...]
    demand: DemandForecast

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise InputError(f"placement problem: {name} must be at least 1, not {getattr(self, name)}")
        if not (math.isfinite(self.memory_bytes) and self.memory_bytes > 0):
            raise InputError(f"placement problem: memory_bytes must be positive, not {self.memory_bytes}")
        if not self.models:
            raise InputError("placement problem: there is no model to place")
        if self.demand.models != tuple(model.name for model in self.models):
            raise InputError("placement problem: the demand must be for the models of the problem, in their order")


def problem_for_cluster(
    forecast: DemandForecast,
    cluster: Cluster,
    profiles: Sequence[ModelProfile],
    *,
    memory_bytes: float | None = None,
) -> PlacementProblem:
    """Return the problem of placing the models of a forecast on a cluster.

    Args:
        forecast: the demand expected; one model per profile.
        cluster: GPUs of equal memory on nodes of equal size; AlpaServe knows no others.
        profiles: of each model of the forecast, in its order.
        memory_bytes: of one GPU; None for its capacity less what it holds when idle.

    Raises:
        InputError: GPUs or nodes that differ, or profiles that are not one per model.
    """
    if len(profiles) != len(forecast.models):
        raise InputError(f"placement problem: {len(profiles)} profiles for {len(forecast.models)} models")
    room = {gpu.capacity_bytes - gpu.idle_bytes for gpu in cluster.gpus}
    nodes = [gpu.node for gpu in cluster.gpus]
    node_sizes = {nodes.count(node) for node in set(nodes)}
    if len(room) > 1 or len(node_sizes) > 1:
        raise InputError(
            f"cluster {cluster.name!r}: AlpaServe's search knows only equal GPUs on nodes of equal size; "
            "give such a cluster or another policy"
        )
    return PlacementProblem(
        gpus=len(cluster),
        gpus_per_node=node_sizes.pop(),
        memory_bytes=room.pop() if memory_bytes is None else memory_bytes,
        models=tuple(
            PlacementModel(name=name, profile=profile) for name, profile in zip(forecast.models, profiles, strict=True)
        ),
        demand=forecast,
    )
