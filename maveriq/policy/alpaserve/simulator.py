"""AlpaServe's placement simulator: what a placement would make of the expected requests.

Every stage of every group has a clock. A request is served within its SLO or dropped when it
arrives; nothing waits, batches or moves (Li et al., OSDI '23, in the form of the published code).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from maveriq.policy.alpaserve.problem import GroupShape, Placement, PlacementProblem, SimulatorSettings, replicas

LATENCY_WEIGHT_PER_S = 1e-4
REPLICA_WEIGHT = 1e-6

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Counts:
    """Requests that were served, per model, and sent to a group, per group, dropped ones included."""

    served: Array
    dispatched: Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementStats:
    """What a placement makes of all requests; one that is dropped ends when it arrives.

    `requests` and `served` count per model, `dispatched` per group. A request
    to an unknown model counts in `attainment` and `mean_latency_s` alone.
    """

    ok: Array
    finish_s: Array
    requests: Array
    served: Array
    dispatched: Array
    attainment: float
    mean_latency_s: float
    replicas: int

    @property
    def score(self) -> float:
        """What the search maximises: attainment first, then latency, then copies.

        Dropped requests count as latency 0, so among equal attainments dropping is rewarded.
        """
        return self.attainment - self.mean_latency_s * LATENCY_WEIGHT_PER_S + self.replicas * REPLICA_WEIGHT


class PlacementSimulator:
    """Simulates placements of one problem; what does not depend on the placement is prepared once.

    Attributes:
        problem: what is placed.
        requests: how many requests each model gets.
    """

    def __init__(
        self,
        problem: PlacementProblem,
        settings: SimulatorSettings | None = None,
        *,
        on_simulated: Callable[[int], None] | None = None,
    ) -> None:
        """Prepare a problem.

        Args:
            problem: what is placed.
            settings: constants; None for the published ones.
            on_simulated: called after each simulation with its number of requests, from any thread.
        """
        from maveriq.policy.alpaserve.kernel import simulate_requests  # late: importing numba takes a second

        self.problem = problem
        self._settings = settings or SimulatorSettings()
        self._on_simulated = on_simulated
        self._loop = simulate_requests
        demand = problem.demand
        # Copies, because the compiled loop would be compiled again for arrays that are read-only.
        self._arrival_s = np.array(demand.arrival_s, np.float64)
        self._model_index = np.array(demand.model_index, np.int64)
        self._slo_s = self._rounded(np.array(demand.slo_s, np.float64))
        known = self._model_index[self._model_index >= 0]
        self.requests = np.bincount(known, minlength=len(problem.models))
        self._tables: dict[GroupShape, Array] = {}

    def run(self, placement: Placement) -> PlacementStats:
        """Simulate a placement and say what became of every request."""
        end_s = np.full_like(self._arrival_s, np.nan)
        counts = self._simulate(placement, end_s)
        ok = ~np.isnan(end_s)
        finish_s = np.where(ok, end_s, self._arrival_s)
        return PlacementStats(
            ok=ok,
            finish_s=finish_s,
            requests=self.requests,
            served=counts.served,
            dispatched=counts.dispatched,
            attainment=int(counts.served.sum()) / len(ok),
            mean_latency_s=float((finish_s - self._arrival_s).mean()),
            replicas=replicas(placement),
        )

    def count(self, placement: Placement) -> Counts:
        """Simulate a placement and return only the counts, which the greedy fill needs."""
        return self._simulate(placement, np.empty(0))

    def _simulate(self, placement: Placement, finish_s: Array) -> Counts:
        models = len(self.problem.models)
        host_start, hosts = _hosts(placement, models)
        group_offset, stage_s = self._stage_tables(placement)
        served, dispatched = np.zeros(models, np.int64), np.zeros(len(placement), np.int64)
        self._loop(
            self._arrival_s,
            self._model_index,
            self._slo_s,
            host_start,
            hosts,
            np.array([group.shape.pp for group in placement], np.int64),
            group_offset,
            stage_s,
            self._settings.overhead_s,
            served,
            dispatched,
            finish_s,
        )
        if self._on_simulated:
            self._on_simulated(len(self._arrival_s))
        return Counts(served=served, dispatched=dispatched)

    def _stage_tables(self, placement: Placement) -> tuple[Array, Array]:
        """Return where each group's table starts, and the tables of all shapes in a row."""
        shapes = list(dict.fromkeys(group.shape for group in placement))
        tables = [self._table(shape) for shape in shapes]
        starts = dict(zip(shapes, np.cumsum([0, *map(len, tables[:-1])]).tolist(), strict=True))
        return np.array([starts[group.shape] for group in placement], np.int64), np.concatenate(tables)

    def _table(self, shape: GroupShape) -> Array:
        """Return the seconds of every model on every stage, infinite where a model cannot run so."""
        table = self._tables.get(shape)
        if table is None:
            rows = [model.profile.shapes.get(shape) for model in self.problem.models]
            latency_s = np.array([row.stage_latency_s if row else (math.inf,) * shape.pp for row in rows])
            table = self._rounded(latency_s.ravel() * self._settings.penalty(shape))
            self._tables[shape] = table
        return table

    def _rounded(self, values: Array) -> Array:
        if not self._settings.single_precision:
            return values
        with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, as published
            return values.astype(np.float32).astype(np.float64)


def simulate(
    problem: PlacementProblem, placement: Placement, settings: SimulatorSettings | None = None
) -> PlacementStats:
    """Simulate one placement of a problem."""
    return PlacementSimulator(problem, settings).run(placement)


def warm_up() -> None:
    """Import and compile the inner loop now; the first simulation does it otherwise."""
    from maveriq.policy.alpaserve.kernel import simulate_requests

    ints, floats = np.zeros(1, np.int64), np.zeros(1)
    bounds = np.array([0, 1])
    simulate_requests(floats, ints, floats, bounds, ints, ints + 1, ints, floats, 0.0, ints + 0, ints + 0, np.empty(0))


def _hosts(placement: Placement, models: int) -> tuple[Array, Array]:
    """Return the groups of each model in ascending order, one model after the other, and where each starts."""
    hosting: list[list[int]] = [[] for _ in range(models)]
    for number, group in enumerate(placement):
        for model in group.models:
            hosting[model].append(number)
    starts = np.cumsum([0, *map(len, hosting)])
    return starts, np.array([number for groups in hosting for number in groups], np.int64)
