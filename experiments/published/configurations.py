"""The configurations that maveriq chooses, compared with those of the recorded system."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from maveriq.domain.cluster import Cluster, ClusterView, GpuView
from maveriq.domain.parallel import DeploymentPlan, ParallelConfig
from maveriq.estimate.registry import PAPER
from maveriq.policy.policy import Decision, Deploy
from maveriq.scenario.build import build_system
from maveriq.sim.simulator import simulate
from maveriq.testbed.recordings import RecordedPlan, RecordedRun, read_runs
from maveriq.testbed.replay import options_of
from maveriq.units import bytes_from_gib, gib


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One recorded deployment, and the choices of maveriq for it.

    `given_memory` is the choice given the measured memory use before the deploy. `free` is the choice in a simulation
    of the whole run. Either is a reason instead if maveriq rejects the endpoint. `memory_error_gib` is the largest
    difference of a GPU from the recorded estimate, None without a choice. `same_gpus`: the free choice uses the
    recorded GPUs, in any order.
    """

    run: str
    endpoint_id: int
    model_name: str
    recorded: ParallelConfig
    given_memory: ParallelConfig | str
    memory_error_gib: float | None
    free: ParallelConfig | str
    same_gpus: bool

    def __str__(self) -> str:
        return (
            f"{self.run}, endpoint {self.endpoint_id} ({self.model_name}): recorded {self.recorded}; "
            f"given memory {self.given_memory}; free {self.free}"
        )


def compare_all(data: Path) -> Iterator[Compared]:
    """Yield a comparison for each started deployment of MaverIQ's runs.

    Args:
        data: the folder of measured data.
    """
    for run in read_runs(data / "testbed"):
        if run.by_maveriq:
            yield from compare(run)


def compare(run: RecordedRun) -> Iterator[Compared]:
    """Yield a comparison for each started deployment of a run."""
    # In the published simulation the paper's estimator also gives the service times.
    system = build_system(replace(options_of(run), service_times=PAPER))
    endpoints = {endpoint.endpoint_id: endpoint for endpoint in system.workload.endpoints}
    simulated = {deployment.endpoint.endpoint_id: deployment for deployment in simulate(system).deployments}
    used_gib: Sequence[float] = [gib(gpu.idle_bytes) for gpu in system.cluster.gpus]
    for deployment in run.deployments:
        view = _view(system.cluster, used_gib)
        used_gib = deployment.used_gib_after
        if deployment.plan is None:
            continue
        given = _plan_or_reason(system.policy.decide(endpoints[deployment.endpoint_id], view))
        free = simulated[deployment.endpoint_id]
        yield Compared(
            run=run.name,
            endpoint_id=deployment.endpoint_id,
            model_name=deployment.model_name,
            recorded=deployment.plan.configuration,
            given_memory=_choice(given),
            memory_error_gib=_memory_error_gib(given, deployment.plan),
            free=_choice(free.plan or free.reason),
            same_gpus=free.plan is not None and set(free.plan.gpu_ids) == set(deployment.plan.gpu_ids),
        )


def _view(cluster: Cluster, used_gib: Sequence[float]) -> ClusterView:
    """Return a cluster with this much memory in use, without load: load decides GPUs, not configurations."""
    return ClusterView(
        gpus=tuple(
            GpuView(
                gpu_id=gpu.gpu_id,
                node=gpu.node,
                capacity_bytes=gpu.capacity_bytes,
                free_bytes=gpu.capacity_bytes - bytes_from_gib(used),
                load=0.0,
            )
            for gpu, used in zip(cluster.gpus, used_gib, strict=True)
        )
    )


def _plan_or_reason(decision: Decision) -> DeploymentPlan | str:
    if isinstance(decision, Deploy):
        (plan,) = decision.plans
        return plan
    return decision.reason


def _choice(plan: DeploymentPlan | str) -> ParallelConfig | str:
    return plan if isinstance(plan, str) else plan.configuration


def _memory_error_gib(plan: DeploymentPlan | str, recorded_plan: RecordedPlan) -> float | None:
    if isinstance(plan, str) or len(plan.gpu_bytes) != len(recorded_plan.gib_per_gpu):
        return None
    pairs = zip(plan.gpu_bytes, recorded_plan.gib_per_gpu, strict=True)
    return max(abs(gib(amount) - recorded_gib) for amount, recorded_gib in pairs)
