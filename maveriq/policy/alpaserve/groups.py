"""Placements: groups of GPUs and the models that each hosts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from maveriq.errors import InvariantError
from maveriq.policy.alpaserve.problem import GroupShape, PlacementProblem


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
    """Return what one GPU of a group holds for its models, on its fullest stage."""
    return sum(problem.models[model].profile.gpu_bytes(group.shape) for model in group.models)


def verify(placement: Placement, problem: PlacementProblem) -> None:
    """Check the laws of a placement.

    Raises:
        InvariantError: more GPUs or memory than there are, or a model twice in a group.
    """
    if sum(group.shape.gpus for group in placement) > problem.gpus:
        raise InvariantError(f"placement {placement} takes more than {problem.gpus} GPUs")
    for group in placement:
        if len(set(group.models)) != len(group.models):
            raise InvariantError(f"group {group} hosts a model twice")
        if gpu_bytes(group, problem) > problem.memory_bytes:
            raise InvariantError(f"group {group} holds more than {problem.memory_bytes:g} bytes on a GPU")


def candidate_shapes(gpus: int, gpus_per_node: int, *, max_pp: int, max_tp: int) -> Iterator[tuple[GroupShape, ...]]:
    """Yield the ways to cut a cluster into groups that the search tries, in its order.

    Groups have a power of two of GPUs and one shape; what is left over becomes pure pipelines of
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


def _powers_of_two(most: int) -> list[int]:
    return [1 << exponent for exponent in range(most.bit_length())]
