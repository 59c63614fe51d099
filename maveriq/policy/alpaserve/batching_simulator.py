"""AlpaServe's placement simulator with batches: what 3.1 drops may wait here and run with others.

Plain Python, for questions about batching; the search does not use it. Profiles need the latency
of every batch size.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from typing import Any

import numpy as np

from maveriq.errors import InputError
from maveriq.policy.alpaserve.problem import Placement, PlacementProblem, SimulatorSettings, replicas
from maveriq.policy.alpaserve.simulator import PlacementStats

BATCH_SIZES = (1, 2, 4, 8, 16)


def simulate_batched(
    problem: PlacementProblem, placement: Placement, settings: SimulatorSettings | None = None
) -> PlacementStats:
    """Simulate a placement whose groups batch requests of one model.

    A request is meant for the group whose last stage is free first, but waits in the queue of its
    model. A group that falls idle takes the model that has waited longest, and as many of its
    requests as a listed size holds and the first one's SLO allows. A request that could not meet
    its SLO even alone and at once is dropped then; the others of a batch count as served.

    Raises:
        InputError: a hosted model cannot run on its group, or lacks the latency of a batch size.
    """
    return _BatchingRun(problem, placement, settings or SimulatorSettings()).run()


class _BatchingRun:
    def __init__(self, problem: PlacementProblem, placement: Placement, settings: SimulatorSettings) -> None:
        self._problem = problem
        self._placement = placement
        self._overhead_s = settings.overhead_s
        single = settings.single_precision
        self._arrival_s: list[float] = np.asarray(problem.demand.arrival_s, np.float64).tolist()
        self._slo_s = _rounded(problem.demand.slo_s, single=single)
        self._stage_s = {
            (number, model, size): _rounded(
                np.array(_latency_s(problem, placement, number, model, size)) * settings.penalty(group.shape),
                single=single,
            )
            for number, group in enumerate(placement)
            for model in group.models
            for size in BATCH_SIZES
        }
        self._clocks = [[0.0] * group.shape.pp for group in placement]
        self._waiting: list[deque[int]] = [deque() for _ in problem.models]
        self._idle: list[tuple[float, int]] = []  # when the first stage of a running group is free
        self._finish_s = [math.nan] * len(self._arrival_s)
        self._dispatched = [0] * len(placement)

    def run(self) -> PlacementStats:
        hosts = [
            [number for number, group in enumerate(self._placement) if model in group.models]
            for model in range(len(self._problem.models))
        ]
        for request, model in enumerate(self._problem.demand.model_index.tolist()):
            now_s = self._arrival_s[request]
            self._run_idle(until_s=now_s)
            if model < 0 or not hosts[model]:
                continue
            number = min(hosts[model], key=lambda one: self._clocks[one][-1])
            self._dispatched[number] += 1
            self._waiting[model].append(request)
            if self._clocks[number][0] <= now_s:
                self._start(number, model, now_s)
        self._run_idle(until_s=math.inf)
        return self._stats()

    def _run_idle(self, *, until_s: float) -> None:
        """Give work to every group that falls idle up to a time."""
        while self._idle and self._idle[0][0] <= until_s:
            now_s, number = heapq.heappop(self._idle)
            started = False
            while not started:
                waiting = [model for model in self._placement[number].models if self._waiting[model]]
                if not waiting:
                    break
                oldest = min(waiting, key=lambda model: self._waiting[model][0])
                started = self._start(number, oldest, now_s)

    def _start(self, number: int, model: int, now_s: float) -> bool:
        """Start a batch of a model on a group, dropping what is too late; say whether one was left to start."""
        queue = self._waiting[model]
        while queue:
            head = queue.popleft()
            due_s = self._slo_s[head]
            if self._ends(number, model, 1, now_s)[-1] + self._overhead_s - self._arrival_s[head] <= due_s:
                break
        else:
            return False
        fitting = [
            size
            for size in BATCH_SIZES
            if size <= 1 + len(queue)
            and self._ends(number, model, size, now_s)[-1] + self._overhead_s - self._arrival_s[head] <= due_s
        ]
        batch = [head, *(queue.popleft() for _ in range(max(fitting) - 1))]
        self._clocks[number] = self._ends(number, model, len(batch), now_s + self._overhead_s)
        heapq.heappush(self._idle, (self._clocks[number][0], number))
        for request in batch:
            self._finish_s[request] = self._clocks[number][-1]
        return True

    def _ends(self, number: int, model: int, size: int, start_s: float) -> list[float]:
        """Return when a batch would leave each stage of a group."""
        ends, end_s = [], start_s
        for clock, stage_s in zip(self._clocks[number], self._stage_s[number, model, size], strict=True):
            end_s = max(end_s, clock) + stage_s
            ends.append(end_s)
        return ends

    def _stats(self) -> PlacementStats:
        demand, models = self._problem.demand, len(self._problem.models)
        end_s, arrival_s = np.array(self._finish_s), np.array(self._arrival_s)
        ok = ~np.isnan(end_s)
        finish_s = np.where(ok, end_s, arrival_s)
        return PlacementStats(
            ok=ok,
            finish_s=finish_s,
            requests=np.bincount(demand.model_index[demand.model_index >= 0], minlength=models),
            served=np.bincount(demand.model_index[ok], minlength=models),
            dispatched=np.array(self._dispatched, np.int64),
            attainment=float(ok.mean()),
            mean_latency_s=float((finish_s - arrival_s).mean()),
            replicas=replicas(self._placement),
        )


def _latency_s(
    problem: PlacementProblem, placement: Placement, number: int, model: int, size: int
) -> tuple[float, ...]:
    profile = problem.models[model].profile.shapes.get(placement[number].shape)
    if profile is None:
        raise InputError(f"model {problem.models[model].name!r} cannot run on a group of {placement[number].shape}")
    return profile.latency_s(size)


def _rounded(values: np.ndarray[Any, Any], *, single: bool) -> list[float]:
    rounded: list[float] = (values.astype(np.float32) if single else values).astype(np.float64).tolist()
    return rounded
