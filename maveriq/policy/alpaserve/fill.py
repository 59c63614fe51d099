"""Filling groups with models: the fast greedy fill, beam search, round robin."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from maveriq.policy.alpaserve.groups import Placement, empty_placement, gpu_bytes, normal_form
from maveriq.policy.alpaserve.problem import GroupShape, PlacementProblem
from maveriq.policy.alpaserve.simulate import PlacementSimulator

BEAM_WIDTH = 3


def fast_greedy(simulator: PlacementSimulator, shapes: tuple[GroupShape, ...]) -> Placement:
    """Give the model with most unserved requests to the group with fewest, until nothing fits.

    Whether an addition helps is not checked: memory is always filled, and nothing makes sure that
    every model is placed. Sorting is stable: of equal models the last comes first, of equal
    groups the first.
    """
    placement = normal_form(empty_placement(shapes))
    while True:
        counts = simulator.count(placement)
        requests = simulator.requests
        # The small number is the published guard against models without requests; it leaves
        # rounding noise in place of 0, which decides between models that are served in full.
        unserved = requests * (1 - counts.served / (requests + 1e-6))
        by_unserved = np.argsort(unserved, kind="stable")[::-1].tolist()
        by_load = np.argsort(counts.dispatched, kind="stable").tolist()
        addition = _first_fitting(placement, by_load, by_unserved, simulator.problem)
        if addition is None:
            return placement
        placement = _with(placement, *addition)


def _first_fitting(
    placement: Placement, groups: list[int], models: list[int], problem: PlacementProblem
) -> tuple[int, int] | None:
    """Return the first group, and for it the first model, that fits together."""
    for number in groups:
        group = placement[number]
        used = gpu_bytes(group, problem)
        for model in models:
            if model in group.models:
                continue
            if used + problem.models[model].profile.gpu_bytes(group.shape) <= problem.memory_bytes:
                return number, model
    return None


def _with(placement: Placement, number: int, model: int) -> Placement:
    grown = placement[number].with_model(model)
    return normal_form((*placement[:number], grown, *placement[number + 1 :]))


def beam_search(simulator: PlacementSimulator, shapes: tuple[GroupShape, ...], *, width: int = BEAM_WIDTH) -> Placement:
    """Add one model at a time in every way, keep the best few, return the best placement ever seen.

    Unlike the other fills it leaves a group short of full: what it adds must leave memory over.
    Equal scores keep the order in which they were found.
    """
    initial = normal_form(empty_placement(shapes))
    best, best_score = initial, -1.0
    beam = [initial]
    while beam:
        seen: set[tuple[tuple[int, ...], ...]] = set()
        scored: list[tuple[float, Placement]] = []
        for placement in (grown for member in beam for grown in _grown(member, simulator.problem)):
            hosted = tuple(group.models for group in placement)
            if hosted not in seen:
                seen.add(hosted)
                scored.append((simulator.run(placement).score, placement))
        scored.sort(key=lambda one: -one[0])
        if scored and scored[0][0] > best_score:
            best_score, best = scored[0]
        beam = [placement for _, placement in scored[:width]]
    return best


def _grown(placement: Placement, problem: PlacementProblem) -> Iterator[Placement]:
    for number, group in enumerate(placement):
        used = gpu_bytes(group, problem)
        for model, spec in enumerate(problem.models):
            if model not in group.models and used + spec.profile.gpu_bytes(group.shape) < problem.memory_bytes:
                yield _with(placement, number, model)


def round_robin(problem: PlacementProblem, shapes: tuple[GroupShape, ...]) -> Placement:
    """Deal models in turn to groups in turn, over and over.

    The turn passes only with a success, so the deal ends at the first full group even where
    others have room, as in the published code. Groups keep their order.
    """
    placement = list(empty_placement(shapes))
    turn, dealt = 0, True
    while dealt:
        dealt = False
        for model, spec in enumerate(problem.models):
            group = placement[turn]
            needed = gpu_bytes(group, problem) + spec.profile.gpu_bytes(group.shape)
            if model not in group.models and needed <= problem.memory_bytes:
                placement[turn] = group.with_model(model)
                turn = (turn + 1) % len(placement)
                dealt = True
    return tuple(placement)
