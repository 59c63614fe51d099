"""Fast-forward through a simulation while requests arrive, engines run, and nothing else happens: in compiled code.

`maveriq.scenario.compiled_cluster` simulates up to the simulator's next other event. Then the controller's records are
updated for many requests at a time, to what event by event would give. Where this does not apply, nothing is done, and
the simulator goes on event by event.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from maveriq.compiling import Integers, address
from maveriq.control.controller import Controller
from maveriq.control.deployment_manager import Deployment, DeploymentState
from maveriq.control.router import Router
from maveriq.control.routing_policies import LeastOutstanding, RoundRobin
from maveriq.domain.deployments import Batching
from maveriq.scenario.clocked_engine import ClockedEngine
from maveriq.scenario.compiled_clock_state import FINISHED, FIRST_TOKEN, PREEMPTED, RUN, STARTED
from maveriq.scenario.compiled_cluster import (
    BUSY,
    IDLE,
    IS_FULL,
    K_ARRIVALS_AT,
    K_CHOSEN_AT,
    K_END,
    K_ENGINES,
    K_ENGINES_AT,
    K_FIRST_ID,
    K_GROUPS_AT,
    K_IN_TURN,
    K_LAST_US,
    K_NEWS,
    K_NEWS_AT,
    K_NEXT,
    K_OUTPUTS_AT,
    K_PROMPTS_AT,
    K_SIZE,
    K_STUCK,
    MAX_NEWS,
    NEEDS_ROWS,
    NEWS_MARGIN,
    NEWS_SIZE,
    R_ASSIGNED,
    R_CLOCK_AT,
    R_ENGINE_AT,
    R_LAST,
    R_MEMBERS,
    R_OUTSTANDING,
    R_SIZE,
    serve,
)
from maveriq.scenario.compiled_engine import CompiledEngine
from maveriq.units import Micros
from maveriq.workload.client import Client
from maveriq.workload.requests import Arrivals, requests_of

_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """The replicas of an endpoint that are up.

    Args:
        first: the number of the first among all engines.
        replicas: their deployments, in order.
        longest: prompt and output tokens of a request that each takes for certain.
    """

    first: int
    replicas: list[Deployment]
    longest: int


class FastForward:
    """Fast-forwards one simulation (mutable).

    Args:
        controller: of the run.
        client: sends the requests at their times, and waits for nothing.
        arrivals: the requests.
        engines: the continuous engines, by deployment; a driver may change it between calls.
        shares_gpu: returns whether the engine of a deployment shares a GPU with another.
    """

    def __init__(
        self, controller: Controller, client: Client, arrivals: Arrivals, engines: Mapping[int, ClockedEngine],
        shares_gpu: Callable[[int], bool],
    ) -> None:  # fmt: skip
        self._controller = controller
        self._client = client
        self._arrivals = arrivals
        self._engines = engines
        self._shares_gpu = shares_gpu
        self._cluster: Integers = np.zeros(K_SIZE, dtype=np.int64)
        self._news: Integers = np.zeros((MAX_NEWS + NEWS_MARGIN, NEWS_SIZE), dtype=np.int64)
        self._members: list[tuple[Deployment, CompiledEngine]] = []
        self._groups: dict[int, _Group] = {}

    def run(self, until_us: Micros) -> Micros | None:
        """Do what happens before a time, or a part of it from the start; return when the last of it happened.

        None stands for nothing: the first thing that happens has to be done event by event.
        """
        if not self._find_members():
            return None
        last_us = None
        while True:
            first = self._client.sent
            end, before_us = self._reach(first, until_us)
            if first == end and not self._has_due(before_us):
                return last_us
            last_us = self._run_rows(first, end, before_us)

    def _last_before(self, until_us: Micros) -> int:
        return int(np.searchsorted(self._arrivals.arrival_us, until_us))

    def _has_due(self, before_us: Micros) -> bool:
        return any(engine.next_us is not None and engine.next_us < before_us for _, engine in self._members)

    def _find_members(self) -> bool:
        """Find the engines that requests can go to, and return whether all engines with work are among them."""
        policy = self._policy()
        self._members, self._groups = [], {}
        for endpoint_id in self._controller.endpoint_ids:
            deployments = self._controller.deployments_of(endpoint_id)
            replicas = [each for each in deployments if each.state is DeploymentState.UP]
            if not replicas or (len(deployments) > 1 and not isinstance(policy, LeastOutstanding | RoundRobin)):
                continue
            engines = [self._engines.get(each.deployment_id) for each in replicas]
            compiled = [engine for engine in engines if isinstance(engine, CompiledEngine)]
            if len(compiled) < len(replicas) or any(self._shares_gpu(each.deployment_id) for each in replicas):
                continue
            longest = min(
                min(self._controller.longest_sequence(deployment), engine.surely_held_tokens)
                for deployment, engine in zip(replicas, compiled, strict=True)
            )
            self._groups[endpoint_id] = _Group(first=len(self._members), replicas=replicas, longest=longest)
            self._members += zip(replicas, compiled, strict=True)
        self._cluster[K_IN_TURN] = isinstance(policy, RoundRobin)
        known = {deployment.deployment_id for deployment, _ in self._members}
        return bool(known) and all(
            number in known or engine.next_us is None for number, engine in self._engines.items()
        )

    def _reach(self, first: int, until_us: Micros) -> tuple[int, Micros]:
        """Return the requests, up to which one, that can be done at once, and the time before which that is."""
        times_us, end = self._arrivals.arrival_us, self._last_before(until_us)
        if end - first > _ROWS_AT_ONCE:  # those of an instant stay together
            end = first + _ROWS_AT_ONCE
            together = int(np.searchsorted(times_us, times_us[first], "right"))
            end = max(int(np.searchsorted(times_us, times_us[end])), together)
            until_us = int(times_us[end]) if end < len(times_us) else until_us
        rows = slice(first, end)
        longest = np.zeros(end - first, dtype=np.int64)
        for endpoint_id, group in self._groups.items():
            longest[self._arrivals.endpoint_id[rows] == endpoint_id] = group.longest
        others = np.flatnonzero(self._arrivals.prompt_tokens[rows] + self._arrivals.output_tokens[rows] > longest)
        if len(others):
            until_us = int(times_us[first + others[0]])
            end = int(np.searchsorted(times_us, until_us))
        return end, until_us

    def _run_rows(self, first: int, end: int, before_us: Micros) -> Micros:
        """Do what happens before a time, in which some requests arrive; return when the last of it happened."""
        cluster, arrivals, rows = self._cluster, self._arrivals, slice(first, end)
        engines = self._engine_rows()
        columns = [
            np.ascontiguousarray(column[rows], dtype=np.int64)
            for column in (arrivals.arrival_us, arrivals.prompt_tokens, arrivals.output_tokens)
        ]
        groups = np.zeros(end - first, dtype=np.int64)
        for endpoint_id, group in self._groups.items():
            groups[arrivals.endpoint_id[rows] == endpoint_id] = group.first
        chosen = np.zeros(end - first, dtype=np.int64)
        cluster[K_ENGINES], cluster[K_ENGINES_AT] = len(engines), address(engines)
        cluster[K_NEXT], cluster[K_END], cluster[K_FIRST_ID] = 0, end - first, first + 1
        cluster[K_ARRIVALS_AT], cluster[K_PROMPTS_AT], cluster[K_OUTPUTS_AT] = map(address, columns)
        cluster[K_GROUPS_AT], cluster[K_CHOSEN_AT] = address(groups), address(chosen)
        cluster[K_NEWS_AT], cluster[K_NEWS], cluster[K_LAST_US] = address(self._news), 0, 0
        done = finished = 0
        unbegun = np.zeros(len(engines), dtype=np.int64)
        while True:
            outcome, _, _ = serve(address(cluster), 0, RUN, before_us, 0, 0)
            routed = int(cluster[K_NEXT])
            self._note_arrivals(first, done, routed, chosen, unbegun)
            finished += self._note_news(first, unbegun)
            done = routed
            if outcome == IS_FULL:
                for _, engine in self._members:
                    engine.pass_on_notes()
            elif outcome == NEEDS_ROWS:
                self._members[int(cluster[K_STUCK])][1].add_rows()
            else:
                break
        self._close(first, end, engines, chosen)
        for number, (deployment, engine) in enumerate(self._members):
            engine.find_next()
            deployment.kv_used_tokens = engine.reported_kv_tokens
            deployment.unbegun_tokens += int(unbegun[number])
        self._client.skip(end - first, finished)
        return int(cluster[K_LAST_US])

    def _engine_rows(self) -> Integers:
        rows = np.zeros((len(self._members), R_SIZE), dtype=np.int64)
        for row, (deployment, engine) in zip(rows, self._members, strict=True):
            row[R_ENGINE_AT], row[R_CLOCK_AT] = engine.addresses
            row[R_OUTSTANDING], row[R_ASSIGNED] = deployment.outstanding, deployment.assigned
        for endpoint_id, group in self._groups.items():
            rows[group.first, R_MEMBERS] = len(group.replicas)
            policy = self._policy()
            if isinstance(policy, RoundRobin):
                last = policy.last.get(endpoint_id, 0)
                rows[group.first, R_LAST] = sum(each.deployment_id <= last for each in group.replicas) - 1
        return rows

    def _policy(self) -> object:
        router = self._controller.router
        return router.policy(Batching.CONTINUOUS) if isinstance(router, Router) else None

    def _note_arrivals(self, first: int, start: int, end: int, chosen: Integers, unbegun: Integers) -> None:
        """Record that requests arrived and went to engines."""
        if start == end:
            return
        arrivals, rows, engines = self._arrivals, slice(first + start, first + end), chosen[start:end]
        numbers = np.array([deployment.deployment_id for deployment, _ in self._members], dtype=np.int64)
        self._controller.tracker.arrived_together(
            endpoint_id=arrivals.endpoint_id[rows],
            deployment_id=numbers[engines],
            arrival_us=arrivals.arrival_us[rows],
            prompt_tokens=arrivals.prompt_tokens[rows],
            output_tokens=arrivals.output_tokens[rows],
            slo_us=arrivals.slo_us[rows],
        )
        for endpoint_id in self._groups:
            here = arrivals.endpoint_id[rows] == endpoint_id
            if here.any():
                self._controller.rates.arrived_together(endpoint_id, arrivals.arrival_us[rows][here])
        np.add.at(unbegun, engines, arrivals.prompt_tokens[rows])
        for (deployment, _), count in zip(self._members, np.bincount(engines, minlength=len(numbers)), strict=True):
            deployment.assigned += int(count)

    def _note_news(self, first: int, unbegun: Integers) -> int:
        """Record what engines did, and return how many requests finished."""
        count = int(self._cluster[K_NEWS])
        self._cluster[K_NEWS] = 0
        if not count:
            return 0
        news = self._news[:count]
        of = {what: news[news[:, 0] == what] for what in (STARTED, PREEMPTED, FIRST_TOKEN, FINISHED)}
        started, tokens = of[STARTED], of[FIRST_TOKEN]
        finished = of[FINISHED][np.argsort(of[FINISHED][:, 4], kind="stable")]  # engines come one after the other
        tracker = self._controller.tracker
        tracker.progressed_together(
            started=(started[:, 1], started[:, 2], started[:, 3]),
            preempted=of[PREEMPTED][:, 1],
            first_tokens=(tokens[:, 1], tokens[:, 4]),
            finished=(finished[:, 1], finished[:, 4], finished[:, 2], finished[:, 3]),
        )
        np.subtract.at(unbegun, started[:, 5], tracker.prompt_tokens(started[:, 1]))
        ended = np.bincount(finished[:, 5], minlength=len(self._members))
        for (deployment, _), number in zip(self._members, ended, strict=True):
            deployment.completed += int(number)
        before = finished[finished[:, 1] <= first]
        for request_id, number in zip(before[:, 1].tolist(), before[:, 5].tolist(), strict=True):
            del self._members[number][0].in_engine[request_id]
        turns = news[news[:, 0] >= BUSY]
        for what, at_us, number in zip(turns[:, 0].tolist(), turns[:, 4].tolist(), turns[:, 5].tolist(), strict=True):
            deployment = self._members[number][0]
            if what == IDLE:
                self._controller.manager.turned_idle(deployment, at_us)
            else:
                self._controller.manager.turned_busy(deployment, at_us)
        return len(finished)

    def _close(self, first: int, end: int, engines: Integers, chosen: Integers) -> None:
        """Give deployments the requests that have not ended, and routing policies what they remember."""
        for row in self._controller.tracker.open_rows(first, end):
            request = next(requests_of(self._arrivals, first=row))
            self._members[int(chosen[row - first])][0].in_engine[request.request_id] = request
        policy = self._policy()
        if isinstance(policy, RoundRobin):
            for endpoint_id, group in self._groups.items():
                last = int(engines[group.first, R_LAST])
                if last >= 0:
                    policy.last[endpoint_id] = group.replicas[last].deployment_id
