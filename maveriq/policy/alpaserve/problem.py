"""Placement problems, placements, and the settings of a search.

A problem holds GPUs, models with their profiles, and the expected demand. A placement is a list of
groups of GPUs with the models that each group hosts. AlpaServe* hosts every model; its code was not
published. Rule F defines it here: three rules agree with all published placements, and of these only
rule F extends to more than one node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from maveriq.domain.cluster import Cluster
from maveriq.domain.requests import DemandForecast
from maveriq.errors import InputError, InvariantError


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

    Raises:
        InputError: there is no stage, the two tuples differ in length, or a time or size is out of range.
    """

    stage_latency_s: tuple[float, ...]
    stage_weight_bytes: tuple[float, ...]

    def __post_init__(self) -> None:
        stages = len(self.stage_latency_s)
        if not stages or stages != len(self.stage_weight_bytes):
            raise InputError(
                f"profile: {stages} stage latencies and {len(self.stage_weight_bytes)} stage weights must be as many"
            )
        if not all(math.isfinite(value) and value >= 0 for value in self.stage_latency_s):
            raise InputError(f"profile: stage latencies must be finite and not negative, not {self.stage_latency_s}")
        if not all(math.isfinite(value) and value > 0 for value in self.stage_weight_bytes):
            raise InputError(f"profile: stage weights must be finite and positive, not {self.stage_weight_bytes}")

    @property
    def slowest_stage_s(self) -> float:
        """Time of the slowest stage, which bounds the throughput of the pipeline."""
        return max(self.stage_latency_s)

    @property
    def gpu_bytes(self) -> float:
        """Bytes on the fullest GPU; the memory check uses it."""
        return max(self.stage_weight_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """A model's profile for every shape in which it can run; other shapes are missing."""

    shapes: Mapping[GroupShape, StageProfile]

    def gpu_bytes(self, shape: GroupShape) -> float:
        """Return the bytes on one GPU of a group; infinite if the model cannot run in this shape."""
        profile = self.shapes.get(shape)
        return math.inf if profile is None else profile.gpu_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementModel:
    """A model to place. `rate_per_s` is its mean rate; only bucketing needs it."""

    name: str
    profile: ModelProfile
    rate_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementProblem:
    """A cluster of equal GPUs, the models to place, and the expected requests.

    Args:
        gpus: number of GPUs.
        gpus_per_node: a group larger than a node takes whole nodes.
        memory_bytes: memory of one GPU for models.
        models: the models; their order breaks ties.
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
        cluster: GPUs of equal memory on nodes of equal size; AlpaServe supports no others.
        profiles: one per model of the forecast, in its order.
        memory_bytes: memory of one GPU for models; None for its capacity less its idle memory.

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
            f"cluster {cluster.name!r}: AlpaServe's search needs equal GPUs on nodes of equal size; "
            "use such a cluster or another policy"
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


@dataclass(frozen=True, slots=True)
class Group:
    """GPUs that serve together, and the models they host, by position in the problem."""

    shape: GroupShape
    models: tuple[int, ...] = ()

    def with_model(self, model: int) -> Group:
        """Return the group hosting one model more."""
        return Group(self.shape, (*self.models, model))


Placement: TypeAlias = tuple[Group, ...]
"""Groups in the order of the GPUs they take; their numbers break ties of dispatch."""


def empty_placement(shapes: Iterable[GroupShape]) -> Placement:
    """Return groups that host nothing yet."""
    return tuple(Group(shape) for shape in shapes)


def replicas(placement: Placement) -> int:
    """Count the copies of models over all groups."""
    return sum(len(group.models) for group in placement)


def normal_form(placement: Placement) -> Placement:
    """Sort the models of each group, then the groups by their models; equal groups keep their order."""
    sorted_groups = (Group(group.shape, tuple(sorted(group.models))) for group in placement)
    return tuple(sorted(sorted_groups, key=lambda group: group.models))


def gpu_bytes(group: Group, problem: PlacementProblem) -> float:
    """Return the bytes that a group's models take on the fullest GPU of the group."""
    return sum(problem.models[model].profile.gpu_bytes(group.shape) for model in group.models)


def verify(placement: Placement, problem: PlacementProblem) -> None:
    """Check the laws of a placement.

    Raises:
        InvariantError: it uses more GPUs or memory than exist, or a group hosts a model twice.
    """
    if sum(group.shape.gpus for group in placement) > problem.gpus:
        raise InvariantError(f"placement {placement} takes more than {problem.gpus} GPUs")
    for group in placement:
        if len(set(group.models)) != len(group.models):
            raise InvariantError(f"group {group} hosts a model twice")
        if gpu_bytes(group, problem) > problem.memory_bytes:
            raise InvariantError(f"group {group} holds more than {problem.memory_bytes:g} bytes on a GPU")


def candidate_shapes(gpus: int, gpus_per_node: int, *, max_pp: int, max_tp: int) -> Iterator[tuple[GroupShape, ...]]:
    """Yield the partitions of a cluster into groups that the search tries, in its order.

    Groups have a power of two of GPUs and one shape; remaining GPUs form pure pipelines of
    ascending powers of two. A group larger than a node takes whole nodes.
    """
    for size in _powers_of_two(gpus):
        if size > gpus_per_node and size % gpus_per_node:
            continue
        for pp in _powers_of_two(size):
            tp = size // pp
            if pp <= max_pp and tp <= max_tp:
                yield (GroupShape(tp, pp),) * (gpus // size) + pure_pipelines(gpus % size)


def pure_pipelines(gpus: int) -> tuple[GroupShape, ...]:
    """Cut GPUs into pipelines of powers of two that add up to them, ascending."""
    return tuple(GroupShape(1, size) for size in _powers_of_two(gpus) if gpus & size)


def _powers_of_two(maximum: int) -> list[int]:
    return [1 << exponent for exponent in range(maximum.bit_length())]


class StarRule(StrEnum):
    """Which candidates AlpaServe* considers; the best score among them wins. Every rule requires all models.

    A: every model is hosted. B: one group spans all GPUs. C: every model is hosted exactly once.
    F: every group hosts every model.
    """

    A = "A"
    B = "B"
    C = "C"
    F = "F"


def qualifies(rule: StarRule, placement: Placement, models: int) -> bool:
    """Return whether a placement of `models` models meets a rule."""
    hosted = {model for group in placement for model in group.models}
    return len(hosted) == models and _RULES[rule](placement, models)


_RULES: Mapping[StarRule, Callable[[Placement, int], bool]] = MappingProxyType(
    {
        StarRule.A: lambda _placement, _models: True,
        # Candidates use all GPUs, so a single group spans them.
        StarRule.B: lambda placement, _models: len(placement) == 1,
        StarRule.C: lambda placement, models: replicas(placement) == models,
        StarRule.F: lambda placement, models: all(len(group.models) == models for group in placement),
    }
)
RULE_DESCRIPTIONS: Mapping[StarRule, str] = MappingProxyType(
    {
        StarRule.A: "hosts every model",
        StarRule.B: "hosts every model in one group of all GPUs",
        StarRule.C: "hosts every model exactly once",
        StarRule.F: "hosts every model in every group",
    }
)


class PlacementPolicy(StrEnum):
    """Which placements are considered."""

    ALPASERVE = "alpaserve"
    ALPASERVE_STAR = "alpaserve-star"
    SELECTIVE_REPLICATION = "selective-replication"
    MODEL_PARALLELISM = "model-parallelism"
    ROUND_ROBIN = "round-robin"


class Fill(StrEnum):
    """How groups are filled with models."""

    GREEDY = "greedy"
    BEAM = "beam"


BEAM_WIDTH = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatorSettings:
    """The constants of the published simulator.

    Args:
        penalty_per_stage: a stage takes this share longer for each stage of its pipeline.
        overhead_s: added to every request's latency; it occupies no GPU.
        single_precision: round stage times and SLOs to float32, as the published code does. It
            decides about requests that end exactly at their deadline.

    Raises:
        InputError: a constant that is negative or not finite.
    """

    penalty_per_stage: float = 0.009
    overhead_s: float = 0.011
    single_precision: bool = True

    def __post_init__(self) -> None:
        for name in ("penalty_per_stage", "overhead_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"placement simulator: {name} must be finite and not negative, not {value}")

    def penalty(self, shape: GroupShape) -> float:
        """Return the factor on the stage times of a shape."""
        return 1 + self.penalty_per_stage * shape.pp


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """How to search.

    Args:
        policy: which placements are considered.
        fill: how groups are filled; round robin ignores it.
        beam: placements that the beam fill keeps at each step.
        group_size: pipeline stages of each group, for model parallelism only.
        max_pp: maximum pipeline stages of a candidate.
        max_tp: maximum tensor parallel degree of a candidate.
        bucket: also try placements in which models of different latency share no GPU (AlpaServe only).
        star_rule: which candidates AlpaServe* considers.
        simulator: the constants of the simulator.
        workers: threads; None for all cores where the problem is large.

    Raises:
        InputError: a number is below 1, or an option does not apply to the policy.
    """

    policy: PlacementPolicy = PlacementPolicy.ALPASERVE
    fill: Fill = Fill.GREEDY
    beam: int = BEAM_WIDTH
    group_size: int | None = None
    max_pp: int = 8
    max_tp: int = 4
    bucket: bool = False
    star_rule: StarRule = StarRule.F
    simulator: SimulatorSettings = field(default_factory=SimulatorSettings)
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("beam", "group_size", "max_pp", "max_tp", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"placement search: {name} must be at least 1, not {value}")
        if self.policy is PlacementPolicy.MODEL_PARALLELISM and self.group_size is None:
            raise InputError("placement search: model-parallelism needs a group_size")
        if self.bucket and self.policy is not PlacementPolicy.ALPASERVE:
            raise InputError(f"placement search: bucket applies to alpaserve, not to {self.policy}")
