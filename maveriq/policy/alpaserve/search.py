"""The placement search: cut the cluster into groups, fill them, keep the best (AlpaServe), and its kin."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from maveriq.errors import InputError
from maveriq.policy.alpaserve.buckets import bucket_models, device_splits, sub_problem
from maveriq.policy.alpaserve.fill import beam_search, fast_greedy, round_robin
from maveriq.policy.alpaserve.groups import Group, Placement, candidate_shapes, pure_pipelines, verify
from maveriq.policy.alpaserve.problem import GroupShape, PlacementProblem
from maveriq.policy.alpaserve.progress import ProgressTally, SearchProgress
from maveriq.policy.alpaserve.settings import Fill, PlacementPolicy, SearchSettings
from maveriq.policy.alpaserve.simulate import PlacementSimulator, PlacementStats
from maveriq.policy.alpaserve.star import WORDS, qualifies

ROUND_ROBIN_STAGES = 4
_WORTH_THREADS = 20_000_000
"""Below this product of requests, models and GPUs a search is over before threads would help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilledCandidate:
    """One way to cut the cluster, filled, and what the simulator says of it."""

    placement: Placement
    attainment: float
    score: float
    mean_latency_s: float
    replicas: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedGroup:
    """A group of the answer: `models` by name, `model_indices` by position in the problem."""

    tp: int
    pp: int
    models: tuple[str, ...]
    model_indices: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSolution:
    """The answer of a search.

    Args:
        best: the placement that was chosen; None where no candidate keeps every model, which
            `reason` then says.
        groups: of the best placement, in the order of the GPUs they take.
        candidates: in the order of enumeration; empty where a policy looks at one cut alone.
        search_s: how long the search took.
    """

    best: FilledCandidate | None
    groups: tuple[PlacedGroup, ...]
    candidates: tuple[FilledCandidate, ...]
    search_s: float
    reason: str = ""

    @property
    def feasible(self) -> bool:
        """Whether there is a placement at all."""
        return self.best is not None


def search(
    problem: PlacementProblem,
    settings: SearchSettings | None = None,
    *,
    progress: Callable[[SearchProgress], None] | None = None,
) -> PlacementSolution:
    """Search the best placement of a problem. Equal problems give equal answers.

    Args:
        problem: what to place where, for which requests.
        settings: how; None for AlpaServe as its code has it.
        progress: is told after each simulation, from any thread, one call at a time.

    Raises:
        InputError: settings that the problem cannot be searched with.
    """
    started = time.perf_counter()
    settings = settings or SearchSettings()
    tally = ProgressTally(progress)
    candidates = _Search(problem, settings, tally).candidates()
    best, reason = _choose(candidates, problem, settings)
    if best is not None and settings.bucket:
        best = _Buckets(problem, settings, tally).better_than(best)
    if best is not None:
        verify(best.placement, problem)
    return PlacementSolution(
        best=best,
        groups=_named(best.placement, problem) if best else (),
        candidates=candidates if settings.policy in _SEARCHING else (),
        search_s=time.perf_counter() - started,
        reason=reason,
    )


_SEARCHING = frozenset({PlacementPolicy.ALPASERVE, PlacementPolicy.ALPASERVE_STAR})


def cuts(problem: PlacementProblem, settings: SearchSettings) -> list[tuple[GroupShape, ...]]:
    """Return the ways to cut the cluster that a policy looks at, in its order.

    Raises:
        InputError: groups that the cluster cannot be cut into.
    """
    gpus = problem.gpus
    match settings.policy:
        case PlacementPolicy.ALPASERVE | PlacementPolicy.ALPASERVE_STAR:
            limits = {"max_pp": settings.max_pp, "max_tp": settings.max_tp}
            return list(candidate_shapes(gpus, problem.gpus_per_node, **limits))
        case PlacementPolicy.SELECTIVE_REPLICATION:
            return [(GroupShape(1, 1),) * gpus]
        case PlacementPolicy.MODEL_PARALLELISM:
            size = settings.group_size or 1
            if gpus % size:
                raise InputError(
                    f"placement search: {gpus} GPUs cannot be cut into groups of {size}; change group_size"
                )
            return [(GroupShape(1, size),) * (gpus // size)]
        case PlacementPolicy.ROUND_ROBIN:
            groups, rest = divmod(gpus, ROUND_ROBIN_STAGES)
            return [(GroupShape(1, ROUND_ROBIN_STAGES),) * groups + pure_pipelines(rest)]


class _Search:
    """Fills the candidates of one problem, on several threads where that helps."""

    def __init__(self, problem: PlacementProblem, settings: SearchSettings, tally: ProgressTally) -> None:
        self._problem = problem
        self._settings = settings
        self._tally = tally
        self._simulator = PlacementSimulator(problem, settings.simulator, on_simulated=tally.simulated)

    def candidates(self) -> tuple[FilledCandidate, ...]:
        tried = cuts(self._problem, self._settings)
        self._tally.expect(len(tried))
        workers = min(self._workers(), len(tried))
        if workers == 1:
            return tuple(map(self._fill, tried))
        # The compiled loop, where nearly all the time goes, runs outside the interpreter's lock.
        with ThreadPoolExecutor(workers) as threads:
            try:
                return tuple(threads.map(self._fill, tried))
            except BaseException:
                self._tally.stop()  # or leaving the block would wait until all are filled
                raise

    def _workers(self) -> int:
        if self._settings.workers is not None:
            return self._settings.workers
        size = len(self._problem.demand) * len(self._problem.models) * self._problem.gpus
        return _cores() if size > _WORTH_THREADS else 1

    def _fill(self, shapes: tuple[GroupShape, ...]) -> FilledCandidate:
        if self._settings.policy is PlacementPolicy.ROUND_ROBIN:
            placement = round_robin(self._problem, shapes)
        elif self._settings.fill is Fill.BEAM:
            placement = beam_search(self._simulator, shapes, width=self._settings.beam)
        else:
            placement = fast_greedy(self._simulator, shapes)
        filled = _scored(placement, self._simulator.run(placement))
        self._tally.filled()
        return filled


def _cores() -> int:
    """Return the cores that this process may use, where the system tells, else all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _scored(placement: Placement, stats: PlacementStats) -> FilledCandidate:
    return FilledCandidate(
        placement=placement,
        attainment=stats.attainment,
        score=stats.score,
        mean_latency_s=stats.mean_latency_s,
        replicas=stats.replicas,
    )


def _choose(
    candidates: Sequence[FilledCandidate], problem: PlacementProblem, settings: SearchSettings
) -> tuple[FilledCandidate | None, str]:
    """Return the first of the best that count, or why there is none."""
    counting = list(candidates)
    if settings.policy is PlacementPolicy.ALPASERVE_STAR:
        models = len(problem.models)
        counting = [one for one in candidates if qualifies(settings.star_rule, one.placement, models)]
    if not counting:
        return None, f"none of {len(candidates)} candidates {WORDS[settings.star_rule]} within the memory of the GPUs"
    return max(counting, key=lambda one: one.score), ""


def _named(placement: Placement, problem: PlacementProblem) -> tuple[PlacedGroup, ...]:
    return tuple(
        PlacedGroup(
            tp=group.shape.tp,
            pp=group.shape.pp,
            models=tuple(problem.models[model].name for model in group.models),
            model_indices=group.models,
        )
        for group in placement
    )


class _Buckets:
    """Searches placements in which models of similar latency share GPUs of their own."""

    def __init__(self, problem: PlacementProblem, settings: SearchSettings, tally: ProgressTally) -> None:
        self._problem = problem
        self._settings = replace(settings, bucket=False)
        self._tally = tally
        self._buckets = bucket_models(problem)

    def better_than(self, best: FilledCandidate) -> FilledCandidate:
        """Return the best placement with buckets if it is strictly better, else the one given."""
        simulator = PlacementSimulator(self._problem, self._settings.simulator, on_simulated=self._tally.simulated)
        if len(self._buckets) == 1:
            return best  # it would search the same problem again
        for split in device_splits(self._problem, self._buckets):
            united = tuple(
                group for bucket, gpus in zip(self._buckets, split, strict=True) for group in self._solve(bucket, gpus)
            )
            found = _scored(united, simulator.run(united))
            best = found if found.score > best.score else best
        return best

    def _solve(self, bucket: tuple[int, ...], gpus: int) -> Placement:
        """Search one bucket on its share of the GPUs, and number its models as in the whole problem."""
        part = sub_problem(self._problem, bucket, gpus)
        candidates = _Search(part, self._settings, self._tally).candidates()
        best, _ = _choose(candidates, part, self._settings)
        if best is None:
            return ()
        return tuple(Group(group.shape, tuple(bucket[model] for model in group.models)) for group in best.placement)
