"""When executions end: engines that share a host process slow each other down while they execute.

The progress of an execution is kept as the time that it would still take without contention. Its
slowdown changes whenever a co-located engine starts or ends an execution, and its end is then
scheduled anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from maveriq.control.events import ExecutionFinished
from maveriq.domain.cluster import Cluster
from maveriq.domain.parallel import DeploymentPlan
from maveriq.domain.requests import Request
from maveriq.estimate.estimator import ContentionAware
from maveriq.units import MICROS_PER_SECOND, Micros

ScheduledEnd: TypeAlias = tuple[ExecutionFinished, Micros]
"""An event, and the time at which to pass it to `ContentionModel.end`."""


@dataclass(slots=True, kw_only=True)
class _SharedExecution:
    """An execution of an engine that shares a host process.

    Args:
        plan: of the engine.
        finished: the event for its end; holds the time of its first token.
        token_us: time per token without contention.
        left_us: time left at `at_us`, without contention.
        first_left_us: likewise to its first token; 0 or less once that is out.
        at_us: when `left_us` was computed.
        slowdown: factor on times at the present contention.
        finish_us: when it ends if the slowdown stays as it is.
    """

    plan: DeploymentPlan
    finished: ExecutionFinished
    token_us: float
    left_us: float
    first_left_us: float
    at_us: Micros
    slowdown: float = 1.0
    finish_us: Micros = -1

    def advance(self, now_us: Micros) -> None:
        """Account for the time since `at_us`."""
        done_us = (now_us - self.at_us) / self.slowdown
        self.left_us -= done_us
        self.first_left_us -= done_us
        self.at_us = now_us

    def reschedule(self, slowdown: float) -> None:
        """Change the slowdown from now on."""
        self.slowdown = slowdown
        if self.first_left_us > 0:
            self.finished.first_token_us = self.at_us + round(self.first_left_us * slowdown)
        # At the earliest in the next microsecond, since the events of this one are being handled.
        self.finish_us = self.at_us + max(1, round(self.left_us * slowdown))


class ContentionModel:
    """All executions that can slow each other down. On each node one host process is shared.

    Args:
        cluster: maps GPUs to nodes.
        estimator: how much engines slow each other down; None if they do not.
    """

    def __init__(self, cluster: Cluster, estimator: ContentionAware | None) -> None:
        self._estimator = estimator
        self._node_of_gpu = [gpu.node for gpu in cluster.gpus]
        self._node_of: dict[int, int] = {}  # of each deployment that shares a process
        self._running: dict[int, dict[int, _SharedExecution]] = {}  # by node, then by deployment

    def start(
        self,
        now_us: Micros,
        finished: ExecutionFinished,
        plan: DeploymentPlan,
        requests: Sequence[Request],
        *,
        service_us: Micros,
    ) -> Sequence[ScheduledEnd]:
        """Start an execution, and return all ends that must be scheduled.

        Args:
            now_us: the present.
            finished: the event for its end, with the time of the first token without contention.
            plan: of the engine.
            requests: what is executed.
            service_us: how long it takes without contention.
        """
        if self._estimator is None or not self._estimator.shares_process(plan.configuration):
            return ((finished, now_us + service_us),)
        deployment_id = finished.deployment_id
        node = self._node_of[deployment_id] = self._node_of_gpu[plan.gpu_ids[0]]
        running = self._running.setdefault(node, {})
        _advance(running, now_us)
        # Nearly always there is one request.
        tokens = requests[0].output_tokens if len(requests) == 1 else max(each.output_tokens for each in requests)
        running[deployment_id] = _SharedExecution(
            plan=plan,
            finished=finished,
            token_us=service_us / tokens,
            left_us=service_us,
            first_left_us=finished.first_token_us - now_us,
            at_us=now_us,
        )
        return self._reschedule(running)

    def end(self, now_us: Micros, finished: ExecutionFinished) -> Sequence[ScheduledEnd] | None:
        """End an execution at its scheduled time, and return the ends that must be scheduled anew.

        Returns None if the execution does not end now: it was rescheduled or aborted.
        """
        node = self._node_of.get(finished.deployment_id)
        if node is None:
            return ()  # it shares no process
        running = self._running[node]
        execution = running.get(finished.deployment_id)
        if execution is None or execution.finished is not finished or execution.finish_us != now_us:
            return None
        return self._leave(now_us, running, [finished.deployment_id])

    def abort(self, now_us: Micros, is_running: Callable[[int, int], bool]) -> list[ScheduledEnd]:
        """Drop executions that a failure has ended, and return the ends that must be scheduled anew.

        Args:
            now_us: the present.
            is_running: whether a deployment still runs an execution (deployment ID, execution ID).
        """
        ends = []
        for running in self._running.values():
            gone = [
                deployment_id
                for deployment_id, execution in running.items()
                if not is_running(deployment_id, execution.finished.execution_id)
            ]
            if gone:
                ends += self._leave(now_us, running, gone)
        return ends

    def _leave(
        self, now_us: Micros, running: dict[int, _SharedExecution], deployment_ids: Iterable[int]
    ) -> list[ScheduledEnd]:
        _advance(running, now_us)
        for deployment_id in deployment_ids:
            del running[deployment_id]
        return self._reschedule(running)

    def _reschedule(self, running: dict[int, _SharedExecution]) -> list[ScheduledEnd]:
        ends, co_located = [], len(running) - 1
        for execution in running.values():
            before_us = execution.finish_us
            if before_us != execution.at_us:  # else it ends at this instant, whatever else starts or ends
                execution.reschedule(self._slowdown(execution, co_located) if co_located else 1.0)
                if execution.finish_us != before_us:
                    ends.append((execution.finished, execution.finish_us))
        return ends

    def _slowdown(self, execution: _SharedExecution, co_located: int) -> float:
        assert self._estimator is not None  # noqa: S101  # without one nothing is shared
        plan = execution.plan
        delay_s = self._estimator.contention_delay_s(plan.model, plan.configuration, co_located=co_located)
        return 1 + delay_s * MICROS_PER_SECOND / execution.token_us


def _advance(running: dict[int, _SharedExecution], now_us: Micros) -> None:
    for execution in running.values():
        execution.advance(now_us)
