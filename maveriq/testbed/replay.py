"""Replays recorded runs with maveriq's queue and dispatcher, to check them against the recording.

`replay` takes arrivals, service times and plans from the recording. Only the dispatch times are
maveriq's (SPEC 6), so the latencies show how accurate these are; nothing is fitted. `options_of`
returns the options that simulate a recorded run from its description alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maveriq.control.controller import ControllerSettings
from maveriq.control.deployment_manager import Deployment
from maveriq.domain.cluster import Cluster, ClusterView, Gpu
from maveriq.domain.deployments import EndpointSpec
from maveriq.domain.parallel import DeploymentPlan
from maveriq.domain.records import NOT_YET, DeploymentRecord, RequestTable, RunRecord
from maveriq.domain.requests import Request, RequestStatus
from maveriq.errors import InputError, InvariantError, UnknownNameError
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.estimate.registry import PAPER
from maveriq.policy.policy import Decision, Deploy
from maveriq.scenario.options import Options
from maveriq.scenario.service_times import RecordedServiceTimes
from maveriq.scenario.system import ReplaySystem
from maveriq.sim.simulator import simulate
from maveriq.testbed.recordings import RecordedRun
from maveriq.testbed.run_records import MemoryStep, gpu_history
from maveriq.units import MICROS_PER_SECOND, Micros
from maveriq.workload.requests import Arrivals, Workload

Array: TypeAlias = npt.NDArray[Any]

_NO_END_US: Micros = 1 << 60  # 36,000 years: every request of a recording was completed, so the replay ends by itself
# An unknown registration time means that no request waited. No request arrives from 29 s before
# such a deploy to 60 s after it, so any loading time from 16 to 48 s gives the same results.
_UNNOTICED_LOAD_US: Micros = 30 * MICROS_PER_SECOND


@dataclass(frozen=True, slots=True)
class _AsRecorded:
    """Deploys the recorded plans; each deployment is an endpoint of its own."""

    plans: Mapping[int, DeploymentPlan]
    name: str = "as-recorded"

    def decide(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:  # noqa: ARG002
        return Deploy(plans=(self.plans[endpoint.endpoint_id],))


def replay(recorded: RunRecord, profile: HardwareProfile) -> RunRecord:
    """Return a recorded run with the start and finish times of completed requests from maveriq's controller.

    Refused and unfinished requests stay as recorded. They do not affect the others: the queue is
    first come, first served, so requests still waiting at the end were behind all completed ones.

    Args:
        recorded: the run; its engines take one request at a time.
        profile: the profile whose dispatcher delays apply.

    Raises:
        InputError: no request was completed, or the recording contradicts its plans: a completed
            request cannot run in the replay.
    """
    done = recorded.requests.status == RequestStatus.COMPLETED.value
    if not done.any():
        raise InputError("a recorded run without a completed request cannot be replayed")
    table = simulate(_scenario(recorded, done, profile)).requests
    lost = np.flatnonzero(table.status != RequestStatus.COMPLETED.value)
    if len(lost):
        request_id = recorded.requests.request_id[done][lost[0]]
        raise InputError(
            f"recorded request {request_id} was completed, which cannot be with its plan: "
            f"{table.reasons[table.reason[lost[0]]]}; check the times of its deployment"
        )
    return _with_times(recorded, done, table)


def _with_times(recorded: RunRecord, done: Array, table: RequestTable) -> RunRecord:
    start_us, finish_us = recorded.requests.start_us.copy(), recorded.requests.finish_us.copy()
    start_us[done], finish_us[done] = table.start_us, table.finish_us
    requests = replace(recorded.requests, start_us=start_us, finish_us=finish_us)
    ended_us = max(recorded.ended_us, int(table.finish_us.max()))
    samples = gpu_history(requests, recorded.deployments, memory=_memory(recorded), ended_us=ended_us)
    return replace(recorded, requests=requests, gpu_samples=samples, ended_us=ended_us)


def _memory(recorded: RunRecord) -> list[MemoryStep]:
    steps = [
        MemoryStep(since_us=time_us, used_bytes=[sample.memory_bytes for sample in samples])
        for time_us, samples in groupby(recorded.gpu_samples, key=lambda sample: sample.time_us)
    ]
    return [MemoryStep(since_us=0, used_bytes=steps[0].used_bytes), *steps] if steps else []


def _scenario(recorded: RunRecord, done: Array, profile: HardwareProfile) -> ReplaySystem:
    table = recorded.requests
    plans = {
        deployment.deployment_id: _plan(deployment, deployment.plan)
        for deployment in recorded.deployments
        if deployment.plan
    }
    started = [deployment for deployment in recorded.deployments if deployment.plan]
    registered_us = {plans[deployment.deployment_id]: _registered_us(deployment) for deployment in started}
    ones = np.ones(int(done.sum()), dtype=np.int64)
    return ReplaySystem(
        cluster=_cluster(started, profile),
        policy=_AsRecorded(plans),
        workload=Workload(
            name="recorded",
            # All are requested at time 0, when every GPU is idle, and load until their recorded
            # registration, so an engine starts exactly when it did in the recording.
            endpoints=tuple(
                replace(deployment.endpoint, endpoint_id=deployment.deployment_id, requested_us=0)
                for deployment in started
            ),
            arrivals=Arrivals(
                arrival_us=table.arrival_us[done],
                endpoint_id=table.deployment_id[done],
                prompt_tokens=ones,
                output_tokens=ones,
                slo_us=0 * ones,
            ),
        ),
        settings=ControllerSettings(timing=profile.timing, load_window=profile.load_window),
        predict_service_time=_no_prediction,
        service_times=RecordedServiceTimes((table.finish_us - table.start_us)[done]),
        load_time=registered_us.__getitem__,
        drain_us=_NO_END_US,
        sample_us=_NO_END_US,
    )


def _cluster(started: list[DeploymentRecord], profile: HardwareProfile) -> Cluster:
    last = max(gpu_id for deployment in started if deployment.plan for gpu_id in deployment.plan.gpu_ids)
    gpus = (
        Gpu(gpu_id=gpu_id, node=0, kind=profile.gpu_kind, capacity_bytes=profile.capacity_bytes)
        for gpu_id in range(last + 1)
    )
    return Cluster(name="recorded", gpus=tuple(gpus))


def _plan(deployment: DeploymentRecord, plan: DeploymentPlan) -> DeploymentPlan:
    """Return the recorded plan without its memory, which a replay does not use."""
    # The note makes equal plans of a run distinct.
    return replace(plan, gpu_bytes=(1,) * len(plan.gpu_ids), note=f"deployment {deployment.deployment_id}")


def _registered_us(deployment: DeploymentRecord) -> Micros:
    if deployment.ready_us == NOT_YET:
        return deployment.endpoint.requested_us + _UNNOTICED_LOAD_US
    return deployment.ready_us


def _no_prediction(deployment: Deployment, request: Request) -> Micros:
    raise InvariantError(f"FIFO needs no prediction of request {request.request_id} of {deployment.name}")


_POLICIES = {"MaverIQ": "hybrid", "MaverIQ-FP16": "hybrid", "AlpaServe": "alpaserve", "AlpaServe*": "alpaserve-star"}


def options_of(run: RecordedRun) -> Options:
    """Return the options of a recorded run; MaverIQ used the paper's estimator and hybrid placement (SPEC 5).

    The requests of AlpaServe's runs were drawn differently (SPEC 7), so these options give the same
    trace but not the same requests.

    Raises:
        UnknownNameError: maveriq does not have the run's policy.
    """
    if run.policy not in _POLICIES:
        raise UnknownNameError("policy of a recorded run", run.policy, _POLICIES)
    return Options(
        policy=_POLICIES[run.policy],
        intent=run.intent or "min-cost",
        float16_only=run.float16_only,
        trace=run.trace,
        scale=run.scale,
        models=run.model_set,
        slo_scale=run.slo_scale,
        estimator=PAPER,
    )
