"""The recorded runs once more: their arrivals, service times and plans, with maveriq's queue and dispatcher.

What is left to maveriq is when each request goes (SPEC 6), so its latencies say how right that is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from recorded import Completed, Layout, RecordedDeployment, RecordedRun, read_completed, read_runs

from maveriq.control.controller import ControllerSettings
from maveriq.control.deployments import Deployment
from maveriq.domain.catalog import load_model
from maveriq.domain.cluster import ClusterView
from maveriq.domain.deployment import DeploymentPlan
from maveriq.domain.intents import DeployAsk, Intent, Objective
from maveriq.domain.requests import Request, RequestStatus
from maveriq.errors import InvariantError
from maveriq.estimate.clusters import cluster_from
from maveriq.estimate.hardware import HardwareProfile, load_profile
from maveriq.policy.base import Decision, Deploy
from maveriq.scenario.scenario import Scenario
from maveriq.sim.engine import simulate
from maveriq.units import MICROS_PER_SECOND, Micros, seconds
from maveriq.workload.base import Arrivals, Workload

_NO_END_US: Micros = 1 << 45  # a year: every request of a recording was completed, so the replay ends by itself
_TESTBED, _PROFILE = "8xA6000", "a6000-short"
# Where nobody knows when an engine registered, nobody was waiting: no request arrives from 29 s
# before a deploy to 60 s after it, and any loading time from 16 to 48 s gives the same figures.
_UNNOTICED_LOAD_US: Micros = 30 * MICROS_PER_SECOND


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueErrors:
    """Latencies of a replay beside the recorded ones.

    `mean_error` and `p95_error` are signed, `median_request_error` is the median over requests
    of the absolute error; all in percent of the recorded latency.
    """

    run: str
    requests: int
    recorded_mean_s: float
    recorded_p95_s: float
    mean_error: float
    p95_error: float
    median_request_error: float


@dataclass(frozen=True, slots=True)
class _AsRecorded:
    """The policy that deploys each endpoint as it was recorded."""

    plans: Mapping[int, DeploymentPlan]
    name: str = "as-recorded"

    def decide(self, ask: DeployAsk, view: ClusterView) -> Decision:  # noqa: ARG002
        return Deploy(plans=(self.plans[ask.endpoint_id],))


def replay_all(data: Path) -> Iterator[QueueErrors]:
    """Yield the errors of each recorded run, the baselines' included.

    Args:
        data: the folder of measured data.
    """
    profile = load_profile(_PROFILE)
    completed = read_completed(data / "testbed")
    for run in read_runs(data / "testbed"):
        yield replay(run, completed[run.name], profile)


def replay(run: RecordedRun, completed: Completed, profile: HardwareProfile) -> QueueErrors:
    """Replay the completed requests of a run and compare latencies.

    Args:
        run: which run.
        completed: its requests. Those that were still waiting at its end went behind all of
            these, so their absence changes nothing.
        profile: whose dispatcher to take.

    Raises:
        InvariantError: a request that was completed on the testbed is not completed here.
    """
    requests = simulate(_scenario(run, completed, profile)).requests
    if not (requests.status == RequestStatus.COMPLETED.value).all():
        raise InvariantError(f"{run.name}: a replay must complete all {len(requests)} requests")
    latency_us = requests.finish_us - requests.arrival_us
    recorded_us = completed.latency_us
    mean_us, p95_us = float(np.mean(recorded_us)), float(np.percentile(recorded_us, 95))
    return QueueErrors(
        run=run.name,
        requests=len(requests),
        recorded_mean_s=seconds(round(mean_us)),
        recorded_p95_s=seconds(round(p95_us)),
        mean_error=100 * (float(np.mean(latency_us)) / mean_us - 1),
        p95_error=100 * (float(np.percentile(latency_us, 95)) / p95_us - 1),
        median_request_error=100 * float(np.median(np.abs(latency_us / recorded_us - 1))),
    )


def _scenario(run: RecordedRun, completed: Completed, profile: HardwareProfile) -> Scenario:
    deployments = [(one, _plan(one, one.layout)) for one in run.deployments if one.layout]
    plans = {one.endpoint_id: plan for one, plan in deployments}
    registered_us = {plan: _registered_us(one) for one, plan in deployments}
    ones = np.ones(len(completed.arrival_us), dtype=np.int64)
    return Scenario(
        cluster=cluster_from(_TESTBED),
        policy=_AsRecorded(plans),
        workload=Workload(
            name=run.name,
            # All are asked for at the start, when every GPU is idle, and load until they were
            # registered: an engine comes up exactly when it did.
            asks=tuple(_ask(endpoint_id, plan) for endpoint_id, plan in plans.items()),
            arrivals=Arrivals(
                arrival_us=completed.arrival_us,
                endpoint_id=completed.endpoint_id,
                prompt_tokens=ones,
                output_tokens=ones,
                slo_us=0 * ones,
                service_us=completed.service_us,
            ),
        ),
        settings=ControllerSettings(timing=profile.timing, load_window=profile.load_window),
        guess=_no_guess,
        serve=None,
        load_time=registered_us.__getitem__,
        drain_us=_NO_END_US,
        sample_us=_NO_END_US,
    )


def _plan(deployment: RecordedDeployment, layout: Layout) -> DeploymentPlan:
    """Return the recorded plan; memory and estimates play no part in a replay."""
    return DeploymentPlan(
        model=load_model(deployment.model_name),
        configuration=layout.configuration,
        layer_split=layout.layer_split,
        gpu_ids=layout.gpu_ids,
        gpu_bytes=(1,) * len(layout.gpu_ids),
        est_latency_s=0.0,
        est_memory_bytes=len(layout.gpu_ids),
        note=f"endpoint {deployment.endpoint_id}",  # tells equal plans of a run apart
    )


def _ask(endpoint_id: int, plan: DeploymentPlan) -> DeployAsk:
    return DeployAsk(
        endpoint_id=endpoint_id,
        model=plan.model,
        intent=Intent(objective=Objective.MIN_COST),
        asked_us=0,
        prompt_tokens=1,
        output_tokens=1,
    )


def _registered_us(deployment: RecordedDeployment) -> Micros:
    if deployment.registered_us is None:
        return deployment.asked_us + _UNNOTICED_LOAD_US
    return deployment.registered_us


def _no_guess(deployment: Deployment, request: Request) -> Micros:
    raise InvariantError(f"first come, first served: nobody guesses request {request.request_id} of {deployment.name}")
