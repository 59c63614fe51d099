"""Neighbours: engines that share a process of the host slow each other down while they execute.

How far an execution has got is kept as the time it would still take alone. Its pace changes
whenever a neighbour starts or ends, and with it the instant at which it will be done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from maveriq.control.events import Execute, ExecutionFinished
from maveriq.domain.cluster import Cluster
from maveriq.domain.parallel import DeploymentPlan
from maveriq.estimate.estimator import ContentionAware
from maveriq.units import MICROS_PER_SECOND, Micros

Due: TypeAlias = tuple[int, Micros]
"""A deployment whose execution will be done at another instant than it was to be, and that instant."""


@dataclass(slots=True, kw_only=True)
class _CoLocatedExecution:
    """An execution under way.

    Args:
        plan: of its engine.
        execution_id: as in its `Execute`.
        token_us: what a token takes alone.
        left_us: what is left of it, alone.
        first_left_us: likewise of its first token; 0 or less once that is out.
        at_us: when `left_us` was true.
        stretch: by which time alone becomes time beside the present neighbours.
        first_token_us: when the first token came, or will at the present pace.
        finish_us: when it will be done at the present pace.
    """

    plan: DeploymentPlan
    execution_id: int
    token_us: float
    left_us: float
    first_left_us: float
    at_us: Micros
    stretch: float = 1.0
    first_token_us: Micros = -1
    finish_us: Micros = -1

    def advance(self, now_us: Micros) -> None:
        """Take note of the time that has passed."""
        passed_us = (now_us - self.at_us) / self.stretch
        self.left_us -= passed_us
        self.first_left_us -= passed_us
        self.at_us = now_us

    def look_ahead(self, stretch: float) -> None:
        """Go on at another pace."""
        self.stretch = stretch
        if self.first_left_us > 0:
            self.first_token_us = self.at_us + round(self.first_left_us * stretch)
        # Not at this very instant, which is settled already.
        self.finish_us = self.at_us + max(1, round(self.left_us * stretch))


class ContentionModel:
    """The executions that have or may have neighbours. A node of the cluster has one process that engines share."""

    def __init__(self, cluster: Cluster, estimator: ContentionAware) -> None:
        self._estimator = estimator
        self._node_of_gpu = [gpu.node for gpu in cluster.gpus]
        self._node_of: dict[int, int] = {}  # of a deployment
        self._members: dict[int, dict[int, _CoLocatedExecution]] = {}  # by deployment, of each node

    def takes(self, plan: DeploymentPlan) -> bool:
        """Say whether executions of an engine belong here."""
        return self._estimator.has_neighbours(plan.configuration)

    def start(
        self, now_us: Micros, action: Execute, plan: DeploymentPlan, *, first_token_us: Micros, service_us: Micros
    ) -> list[Due]:
        """Take in an execution that takes so long to its first and last token alone; return who is due when now."""
        node = self._node_of[action.deployment_id] = self._node_of_gpu[plan.gpu_ids[0]]
        members = self._members.setdefault(node, {})
        _advance(members, now_us)
        requests = action.requests
        # Nearly always it is one.
        tokens = requests[0].output_tokens if len(requests) == 1 else max(one.output_tokens for one in requests)
        members[action.deployment_id] = _CoLocatedExecution(
            plan=plan,
            execution_id=action.execution_id,
            token_us=service_us / tokens,
            left_us=service_us,
            first_left_us=first_token_us,
            at_us=now_us,
        )
        return self._look_ahead(members)

    def end(self, now_us: Micros, deployment_id: int) -> tuple[ExecutionFinished, list[Due]] | None:
        """Return the execution of a deployment that is done now, and who is due when then; None if none is done."""
        members = self._members[self._node_of[deployment_id]]
        member = members.get(deployment_id)
        if not member or member.finish_us != now_us:
            return None  # it was put off, or broke off
        finished = ExecutionFinished(deployment_id, member.execution_id, member.first_token_us)
        return finished, self._leave(now_us, members, [deployment_id])

    def abort(self, now_us: Micros, runs: Callable[[int, int], bool]) -> list[Due]:
        """Let go what does not run any more though it was not done; return who is due when then.

        Args:
            now_us: the present.
            runs: whether a deployment is at an execution.
        """
        due = []
        for members in self._members.values():
            gone = [one for one, member in members.items() if not runs(one, member.execution_id)]
            if gone:
                due += self._leave(now_us, members, gone)
        return due

    def _leave(self, now_us: Micros, members: dict[int, _CoLocatedExecution], gone: Iterable[int]) -> list[Due]:
        _advance(members, now_us)
        for deployment_id in gone:
            del members[deployment_id]
        return self._look_ahead(members)

    def _look_ahead(self, members: dict[int, _CoLocatedExecution]) -> list[Due]:
        due, neighbours = [], len(members) - 1
        for deployment_id, member in members.items():
            before_us = member.finish_us
            if before_us != member.at_us:  # else it is done at this very instant, whoever else comes or goes
                member.look_ahead(self._stretch(member, neighbours) if neighbours else 1.0)
                if member.finish_us != before_us:
                    due.append((deployment_id, member.finish_us))
        return due

    def _stretch(self, member: _CoLocatedExecution, neighbours: int) -> float:
        plan = member.plan
        wait_s = self._estimator.wait_s(plan.model, plan.configuration, neighbours=neighbours)
        return 1 + wait_s * MICROS_PER_SECOND / member.token_us


def contention_model(cluster: Cluster, estimator: ContentionAware | None) -> ContentionModel | None:
    """Return the contention model of a cluster; None where co-located engines do not slow each other down."""
    return None if estimator is None else ContentionModel(cluster, estimator)


def _advance(members: dict[int, _CoLocatedExecution], now_us: Micros) -> None:
    for member in members.values():
        member.advance(now_us)
