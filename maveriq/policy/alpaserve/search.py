"""The placement search: divide the cluster into groups, fill them with models, keep the best (AlpaServe and variants).

Groups are filled greedily, by beam search or round robin. With buckets, models of different latency
share no GPU.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from maveriq.errors import InputError
from maveriq.policy.alpaserve.problem import (
    BEAM_WIDTH,
    RULE_DESCRIPTIONS,
    Fill,
    Group,
    GroupShape,
    Placement,
    PlacementPolicy,
    PlacementProblem,
    SearchSettings,
    candidate_shapes,
    empty_placement,
    gpu_bytes,
    normal_form,
    pure_pipelines,
    qualifies,
    verify,
)
from maveriq.policy.alpaserve.simulator import PlacementSimulator, PlacementStats


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchProgress:
    """Counts so far. `candidates` grows while a search with buckets goes on."""

    candidates: int = 0
    candidates_done: int = 0
    simulations: int = 0
    requests: int = 0


class SearchStopped(Exception):  # noqa: N818  (not an error; never leaves the search)
    """Ends the threads of a search that was interrupted."""


class ProgressTally:
    """Counts the reports of a search's threads and calls a listener after each."""

    def __init__(self, listener: Callable[[SearchProgress], None] | None) -> None:
        """Start at zero; `listener` may be None."""
        self._listener = listener
        self._lock = threading.Lock()
        self._progress = SearchProgress()
        self._stopped = False

    def stop(self) -> None:
        """Let every thread end at its next report."""
        self._stopped = True

    def expect(self, candidates: int) -> None:
        """Add candidates that will be filled."""
        self._add(candidates=candidates)

    def filled(self) -> None:
        """Count a filled candidate."""
        self._add(candidates_done=1)

    def simulated(self, requests: int) -> None:
        """Count a simulated placement and its requests."""
        self._add(simulations=1, requests=requests)

    def _add(self, **counts: int) -> None:
        if self._stopped:
            raise SearchStopped
        if self._listener is None:
            return
        with self._lock:
            now = {name: getattr(self._progress, name) + more for name, more in counts.items()}
            self._progress = replace(self._progress, **now)
            self._listener(self._progress)


def fast_greedy(simulator: PlacementSimulator, shapes: tuple[GroupShape, ...]) -> Placement:
    """Give the model with most unserved requests to the group with fewest, until nothing fits.

    Additions are not checked for benefit: memory is always filled, and a model may stay unplaced.
    Sorting is stable: of equal models the last comes first, of equal groups the first.
    """
    placement = normal_form(empty_placement(shapes))
    while True:
        counts = simulator.count(placement)
        requests = simulator.requests
        # 1e-6 is the published guard against models without requests. It leaves rounding noise instead
        # of 0, which decides between fully served models.
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
    """Return the first group that fits any model, and the first such model."""
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
    """Extend placements by one model in every way, keep the best few, return the best placement found.

    Unlike the other fills it never fills a GPU exactly: an addition must leave some memory free.
    Placements with equal scores keep their order.
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
        scored.sort(key=lambda entry: -entry[0])
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
    """Assign models in turn to groups in turn until a whole pass over the models adds nothing.

    The next group gets its turn only after a success, so the search ends at the first full group even
    if others have free memory, as in the published code. Groups keep their order.
    """
    placement = list(empty_placement(shapes))
    turn, added = 0, True
    while added:
        added = False
        for model, spec in enumerate(problem.models):
            group = placement[turn]
            needed = gpu_bytes(group, problem) + spec.profile.gpu_bytes(group.shape)
            if model not in group.models and needed <= problem.memory_bytes:
                placement[turn] = group.with_model(model)
                turn = (turn + 1) % len(placement)
                added = True
    return tuple(placement)


ROUND_ROBIN_STAGES = 4
_WORTH_THREADS = 20_000_000
"""Below this product of requests, models and GPUs a search ends before threads would pay off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilledCandidate:
    """A partition of the cluster, filled with models, and its simulated figures."""

    placement: Placement
    attainment: float
    score: float
    mean_latency_s: float
    replicas: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedGroup:
    """A group of the solution: `models` by name, `model_indices` by position in the problem."""

    tp: int
    pp: int
    models: tuple[str, ...]
    model_indices: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSolution:
    """The result of a search.

    Args:
        best: the chosen placement; None if no candidate hosts every model (see `reason`).
        groups: of the best placement, in the order of their GPUs.
        candidates: in the order of enumeration; empty for policies with a single partition.
        reason: why there is no placement; "" if there is one.
        search_s: how long the search took.
    """

    best: FilledCandidate | None
    groups: tuple[PlacedGroup, ...]
    candidates: tuple[FilledCandidate, ...]
    search_s: float
    reason: str = ""

    @property
    def feasible(self) -> bool:
        """Whether the search found a placement."""
        return self.best is not None


def search(
    problem: PlacementProblem,
    settings: SearchSettings | None = None,
    *,
    progress: Callable[[SearchProgress], None] | None = None,
) -> PlacementSolution:
    """Search the best placement of a problem. Equal problems give equal solutions.

    Args:
        problem: the GPUs, models and expected requests.
        settings: how to search; None for AlpaServe as published.
        progress: called after each simulation, from any thread, one call at a time.

    Raises:
        InputError: the settings do not apply to the problem.
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


def partitions(problem: PlacementProblem, settings: SearchSettings) -> list[tuple[GroupShape, ...]]:
    """Return the partitions of the cluster that a policy considers, in its order.

    Raises:
        InputError: the cluster cannot be divided into such groups.
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
        tried = partitions(self._problem, self._settings)
        self._tally.expect(len(tried))
        workers = min(self._workers(), len(tried))
        if workers == 1:
            return tuple(map(self._fill, tried))
        # The compiled loop, where nearly all the time goes, runs outside the interpreter's lock.
        with ThreadPoolExecutor(workers) as threads:
            try:
                return tuple(threads.map(self._fill, tried))
            except BaseException:
                self._tally.stop()  # otherwise the `with` block waits until all are filled
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
    """Return the number of cores this process may use; all cores if the system does not say."""
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
    """Return the first of the best eligible candidates, or why there is none."""
    eligible = list(candidates)
    if settings.policy is PlacementPolicy.ALPASERVE_STAR:
        models = len(problem.models)
        eligible = [candidate for candidate in candidates if qualifies(settings.star_rule, candidate.placement, models)]
    if not eligible:
        rule = RULE_DESCRIPTIONS[settings.star_rule]
        return None, f"none of {len(candidates)} candidates {rule} within the memory of the GPUs"
    return max(eligible, key=lambda candidate: candidate.score), ""


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
    """Searches placements in which only models of similar latency share GPUs."""

    def __init__(self, problem: PlacementProblem, settings: SearchSettings, tally: ProgressTally) -> None:
        self._problem = problem
        self._settings = replace(settings, bucket=False)
        self._tally = tally
        self._buckets = bucket_models(problem)

    def better_than(self, best: FilledCandidate) -> FilledCandidate:
        """Return the best placement with buckets if it is strictly better, else the one given."""
        simulator = PlacementSimulator(self._problem, self._settings.simulator, on_simulated=self._tally.simulated)
        if len(self._buckets) == 1:
            return best  # the search would repeat the same problem
        for split in device_splits(self._problem, self._buckets):
            united = tuple(
                group for bucket, gpus in zip(self._buckets, split, strict=True) for group in self._solve(bucket, gpus)
            )
            found = _scored(united, simulator.run(united))
            best = found if found.score > best.score else best
        return best

    def _solve(self, bucket: tuple[int, ...], gpus: int) -> Placement:
        """Search one bucket on its share of the GPUs; model numbers are those of the whole problem."""
        part = sub_problem(self._problem, bucket, gpus)
        candidates = _Search(part, self._settings, self._tally).candidates()
        best, _ = _choose(candidates, part, self._settings)
        if best is None:
            return ()
        return tuple(Group(group.shape, tuple(bucket[model] for model in group.models)) for group in best.placement)


_SIMILAR = 0.38
_GPUS_PER_STEP = 8
_THRESHOLDS = (1.0, 0.5, 0.3, 0.2, 0.1)
_FEW = 100

Bucket = tuple[int, ...]


def bucket_models(problem: PlacementProblem) -> list[Bucket]:
    """Put each model into the first bucket whose first model takes about as long on one GPU.

    Raises:
        InputError: a model does not run on one GPU, so its latency is unknown.
    """
    latency_s = [_single_gpu_s(problem, model) for model in range(len(problem.models))]
    buckets: list[Bucket] = []
    for model, took_s in enumerate(latency_s):
        for number, bucket in enumerate(buckets):
            first_s = latency_s[bucket[0]]
            if abs(took_s - first_s) <= _SIMILAR * first_s:
                buckets[number] = (*bucket, model)
                break
        else:
            buckets.append((model,))
    return buckets


def _single_gpu_s(problem: PlacementProblem, model: int) -> float:
    profile = problem.models[model].profile.shapes.get(GroupShape(1, 1))
    if profile is None:
        raise InputError(
            f"placement search: bucket needs the latency of every model on one GPU (tp 1, pp 1), and the profile of "
            f"{problem.models[model].name!r} has none; add it or leave bucket out"
        )
    return profile.slowest_stage_s


def device_splits(problem: PlacementProblem, buckets: Sequence[Bucket]) -> list[tuple[int, ...]]:
    """Return how many GPUs each bucket may get: the ordered splits that come near its share of the load.

    Raises:
        InputError: a model has no rate, or all rates are 0.
    """
    rates = [sum(_rate(problem, model) for model in bucket) for bucket in buckets]
    if not sum(rates) > 0:
        raise InputError("placement search: bucket needs a positive rate_per_s of at least one model")
    wanted = np.array(rates) / sum(rates)
    latency_s = np.array([_single_gpu_s(problem, bucket[0]) for bucket in buckets])
    if not (latency_s > 0).all():
        raise InputError("placement search: bucket needs a positive latency of every model on one GPU")
    splits = list(_ordered_splits(problem.gpus, len(buckets)))
    for threshold in _THRESHOLDS:
        splits = [split for split in splits if _distance(split, latency_s, wanted) < threshold]
        if len(splits) < _FEW:
            break
    return splits


def _rate(problem: PlacementProblem, model: int) -> float:
    rate = problem.models[model].rate_per_s
    if rate is None:
        raise InputError(f"placement search: bucket needs the rate_per_s of model {problem.models[model].name!r}")
    return rate


def _ordered_splits(gpus: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (gpus,)
        return
    for last in range(1, gpus):
        rest = gpus - last
        # The last part must not split a node of eight GPUs more than the rest does (as published).
        if last <= gpus % _GPUS_PER_STEP or rest % _GPUS_PER_STEP == 0 or gpus % _GPUS_PER_STEP == 0:
            yield from ((*split, last) for split in _ordered_splits(rest, parts - 1))


def _distance(split: tuple[int, ...], latency_s: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    power = np.array(split) / latency_s
    return float(np.abs(power / power.sum() - wanted).max())


def sub_problem(problem: PlacementProblem, bucket: Bucket, gpus: int) -> PlacementProblem:
    """Return the problem of one bucket on `gpus` GPUs; requests to other models get no model."""
    position = np.full(len(problem.models) + 1, -1)  # index -1 reads the last entry
    position[list(bucket)] = range(len(bucket))
    models = tuple(problem.models[model] for model in bucket)
    demand = replace(
        problem.demand,
        models=tuple(model.name for model in models),
        model_index=position[problem.demand.model_index],
    )
    return replace(problem, gpus=gpus, models=models, demand=demand)
