"""Converts recorded runs to `RunRecord`, the schema of all runs, so that they compare directly with simulated ones.

Values that a recording lacks stay empty: the time of the first token, the estimated latency, and
the registration time of an engine for which no request waited. Every scheduled request gets a status:

- completed if it has a row; it started at arrival + latency - service;
- refused if its model never had a deployment; it was dropped on arrival;
- unfinished otherwise; it was waiting when the run ended.

`gpu_history` derives the memory and utilization of GPUs, which a recording lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maveriq.domain.deployments import EndpointSpec, Intent, Objective
from maveriq.domain.models import ModelSpec, load_model
from maveriq.domain.parallel import DeploymentPlan
from maveriq.domain.records import NOT_YET, DeploymentRecord, GpuSample, RequestTable, RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.errors import InputError
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.testbed.recordings import (
    TESTBED_GPUS,
    Completed,
    RecordedDeployment,
    RecordedPlan,
    RecordedRun,
    Scheduled,
)
from maveriq.units import MICROS_PER_SECOND, Bytes, Micros, bytes_from_gib, duration_micros
from maveriq.workload.arrivals import BIN_S, LOAD_SHIFT_S
from maveriq.workload.lengths import CHARS_PER_TOKEN
from maveriq.workload.model_sets import load_model_set

Array: TypeAlias = npt.NDArray[Any]

OUTPUT_TOKENS = 20
"""Of every request of the recorded runs (SPEC 7)."""

_REASONS = ("", "its model was never deployed", "the run ended first")
_NEVER_DEPLOYED, _RUN_ENDED = 1, 2


def run_record(run: RecordedRun, scheduled: Scheduled, completed: Completed, profile: HardwareProfile) -> RunRecord:
    """Return the records of a recorded run.

    Args:
        run: the run.
        scheduled: its scheduled requests.
        completed: its completed requests.
        profile: the profile of the testbed (idle memory, SLOs at scale 1, drain time).

    Raises:
        InputError: the tables contradict each other.
    """
    deployments = _deployments(run, scheduled, profile)
    requests = _requests(run, scheduled, completed, profile)
    finished_us = int(requests.finish_us.max())
    stopped_us = int(scheduled.arrival_us[-1]) + profile.drain_us
    unfinished = bool((requests.status == RequestStatus.UNFINISHED.value).any())
    ended_us = max(finished_us, stopped_us) if unfinished else finished_us
    return RunRecord(
        requests=requests,
        deployments=deployments,
        gpu_samples=gpu_history(requests, deployments, memory=_memory(run, profile), ended_us=ended_us),
        models=_models(run, scheduled),
        ended_us=ended_us,
    )


def _requests(run: RecordedRun, scheduled: Scheduled, completed: Completed, profile: HardwareProfile) -> RequestTable:
    """Return all requests of the schedule in order of arrival."""
    deployment_of = {endpoint_id.endpoint_id: number for number, endpoint_id in enumerate(_started(run), start=1)}
    deployment_id = np.array(
        [deployment_of.get(endpoint_id, 0) for endpoint_id in scheduled.endpoint_id.tolist()], dtype=np.int64
    )
    done = _rows_of(run, completed, scheduled.endpoint_id, np.flatnonzero(deployment_id))
    arrival_us = scheduled.arrival_us.copy()
    start_us, finish_us = (np.full(len(scheduled), NOT_YET, dtype=np.int64) for _ in range(2))
    status = np.where(deployment_id > 0, RequestStatus.UNFINISHED.value, RequestStatus.REFUSED.value)
    reason = np.where(deployment_id > 0, _RUN_ENDED, _NEVER_DEPLOYED)
    arrival_us[done] = completed.arrival_us
    finish_us[done] = completed.arrival_us + completed.latency_us
    start_us[done] = finish_us[done] - completed.service_us
    status[done], reason[done] = RequestStatus.COMPLETED.value, 0
    table = RequestTable(
        request_id=scheduled.request_id,
        endpoint_id=scheduled.endpoint_id,
        deployment_id=deployment_id,
        arrival_us=arrival_us,
        start_us=start_us,
        first_token_us=np.full(len(scheduled), NOT_YET, dtype=np.int64),
        finish_us=finish_us,
        status=status,
        reason=reason,
        prompt_tokens=_tokens(scheduled.prompt_chars),
        cached_tokens=np.zeros(len(scheduled), dtype=np.int64),
        output_tokens=np.full(len(scheduled), OUTPUT_TOKENS, dtype=np.int64),
        preemptions=np.zeros(len(scheduled), dtype=np.int64),
        steps=np.zeros(len(scheduled), dtype=np.int64),
        slo_us=_slos_us(run, scheduled, profile),
        reasons=_REASONS,
    )
    return _in_order_of_arrival(table)


def _rows_of(run: RecordedRun, completed: Completed, endpoint_id: Array, admitted: Array) -> Array:
    """Return the row in the schedule of each completed request.

    Requests for models without a deployment were dropped before they got a number, so number k
    is the k-th of the other requests.
    """
    if len(np.unique(completed.admitted_id)) < len(completed) or completed.admitted_id.max() > len(admitted):
        raise InputError(f"recorded run {run.name!r}: a request was completed twice, or was never scheduled")
    rows: Array = admitted[completed.admitted_id - 1]
    wrong = np.flatnonzero(endpoint_id[rows] != completed.endpoint_id)
    if len(wrong):
        raise InputError(
            f"recorded run {run.name!r}: request {completed.admitted_id[wrong[0]]} was completed by model "
            f"{completed.endpoint_id[wrong[0]]} but scheduled for {endpoint_id[rows[wrong[0]]]}"
        )
    return rows


def _in_order_of_arrival(table: RequestTable) -> RequestTable:
    order = np.argsort(table.arrival_us, kind="stable")
    columns = {name: getattr(table, name)[order] for name in table.__slots__ if name != "reasons"}
    return RequestTable(**columns, reasons=table.reasons)


def _tokens(chars: Array) -> Array:
    tokens: Array = np.maximum(np.rint(chars / CHARS_PER_TOKEN), 1).astype(np.int64)
    return tokens


def _slos_us(run: RecordedRun, scheduled: Scheduled, profile: HardwareProfile) -> Array:
    models = _models(run, scheduled)
    slos_us = {endpoint_id: _slo_us(run, name, profile) for endpoint_id, name in models.items()}
    return np.array([slos_us[endpoint_id] for endpoint_id in scheduled.endpoint_id.tolist()], dtype=np.int64)


def _slo_us(run: RecordedRun, model_name: str, profile: HardwareProfile) -> Micros:
    slo_s = profile.slo_s(model_name, OUTPUT_TOKENS)
    return duration_micros(run.slo_scale * slo_s) if run.slo_scale and slo_s else 0


def _models(run: RecordedRun, scheduled: Scheduled) -> dict[int, str]:
    """Return the model of each endpoint.

    A recording does not name models that were never deployed. They are the models of the set
    without a deployment, in the order of the set.
    """
    models = {deployment.endpoint_id: deployment.model_name for deployment in run.deployments}
    absent = sorted(set(np.unique(scheduled.endpoint_id).tolist()) - set(models))
    if absent:
        left = iter(_not_deployed(run))
        last = load_model_set(run.model_set).entries[-1].model.name
        models |= {endpoint_id: next(left, last) for endpoint_id in absent}
    return dict(sorted(models.items()))


def _not_deployed(run: RecordedRun) -> list[str]:
    """Return the models of the set without a deploy command, which is recognised by the bin of its time."""
    bins = {_load_bin(deployment) for deployment in run.deployments}
    return [entry.model.name for entry in load_model_set(run.model_set).entries if entry.load_at not in bins]


def _load_bin(deployment: RecordedDeployment) -> int:
    """Return the bin in which a model of a set loads, the inverse of `arrivals.deploy_times`."""
    at_s = deployment.requested_us // MICROS_PER_SECOND - LOAD_SHIFT_S * (deployment.endpoint_id - 1)
    return max(0, at_s // BIN_S - 1)


def _started(run: RecordedRun) -> Iterator[RecordedDeployment]:
    return (deployment for deployment in run.deployments if deployment.plan)


def _deployments(run: RecordedRun, scheduled: Scheduled, profile: HardwareProfile) -> tuple[DeploymentRecord, ...]:
    """Return the deployments that started, numbered from 1, then those that did not."""
    typical = int(np.median(_tokens(scheduled.prompt_chars)))
    held = _idle(profile)
    after: dict[int, tuple[Sequence[Bytes], Sequence[Bytes]]] = {}
    for deployment in run.deployments:
        used = _used(deployment, profile)
        after[deployment.endpoint_id] = held, used
        held = used
    # The sort is stable, so deployments stay in order of time.
    ordered = sorted(run.deployments, key=lambda deployment: deployment.plan is None)
    return tuple(
        _deployment(run, deployment, number, typical, after[deployment.endpoint_id], profile)
        for number, deployment in enumerate(ordered, start=1)
    )


def _deployment(
    run: RecordedRun,
    recorded: RecordedDeployment,
    number: int,
    prompt_tokens: int,
    memory: tuple[Sequence[Bytes], Sequence[Bytes]],
    profile: HardwareProfile,
) -> DeploymentRecord:
    model = load_model(recorded.model_name)
    slo_s = profile.slo_s(model.name, OUTPUT_TOKENS)
    # A baseline has no objective, which the schema cannot express; the default stands in.
    objective = Objective.named(run.intent) if run.intent else Objective.MIN_COST
    endpoint = EndpointSpec(
        endpoint_id=recorded.endpoint_id,
        model=model,
        intent=Intent(
            objective=objective,
            slo_s=run.slo_scale * slo_s if run.slo_scale and slo_s else None,
            float16_only=run.float16_only,
        ),
        requested_us=recorded.requested_us,
        prompt_tokens=prompt_tokens,
        output_tokens=OUTPUT_TOKENS,
    )
    return DeploymentRecord(
        deployment_id=number,
        endpoint=endpoint,
        plan=_plan(model, recorded.plan, *memory) if recorded.plan else None,
        ready_us=NOT_YET if recorded.registered_us is None or recorded.plan is None else recorded.registered_us,
        removed_us=NOT_YET,
        status="up" if recorded.plan else "rejected",
        reason="" if recorded.plan else "it never came up",
    )


def _plan(
    model: ModelSpec, recorded_plan: RecordedPlan, before: Sequence[Bytes], after: Sequence[Bytes]
) -> DeploymentPlan:
    """Return the recorded plan with the memory that it was measured to take."""
    return DeploymentPlan(
        model=model,
        configuration=recorded_plan.configuration,
        gpu_ids=recorded_plan.gpu_ids,
        # Other deployments may have freed memory in between; a plan needs at least 1 byte.
        gpu_bytes=tuple(max(1, after[gpu_id] - before[gpu_id]) for gpu_id in recorded_plan.gpu_ids),
        est_latency_s=0.0,
        est_memory_bytes=bytes_from_gib(sum(recorded_plan.gib_per_gpu)),
    )


def _idle(profile: HardwareProfile) -> tuple[Bytes, ...]:
    return (profile.idle_bytes,) * TESTBED_GPUS


def _used(deployment: RecordedDeployment, profile: HardwareProfile) -> tuple[Bytes, ...]:
    return tuple(map(bytes_from_gib, deployment.used_gib_after)) or _idle(profile)


def _memory(run: RecordedRun, profile: HardwareProfile) -> list[MemoryStep]:
    """Return the memory of the GPUs over time; a deployment holds its memory from its command on."""
    later = (
        MemoryStep(since_us=deployment.requested_us, used_bytes=_used(deployment, profile))
        for deployment in run.deployments
        if deployment.used_gib_after
    )
    return [MemoryStep(since_us=0, used_bytes=_idle(profile)), *later]


_MAX_SAMPLES = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStep:
    """Memory used on each GPU from `since_us` on, in the order of GPU ids."""

    since_us: Micros
    used_bytes: Sequence[Bytes]


def gpu_history(
    requests: RequestTable,
    deployments: Sequence[DeploymentRecord],
    *,
    memory: Sequence[MemoryStep],
    ended_us: Micros,
) -> tuple[GpuSample, ...]:
    """Return samples of each GPU every second, less often in a long run, and at the end.

    Args:
        requests: a GPU is busy from the start to the finish of each request of its deployments.
        deployments: the deployments with their GPUs.
        memory: steps in order of time, the first at 0.
        ended_us: the end of the run.
    """
    every_us = MICROS_PER_SECOND * max(1, -(-ended_us // (MICROS_PER_SECOND * _MAX_SAMPLES)))
    instants_us = np.unique(np.append(np.arange(every_us, ended_us, every_us), ended_us))
    step_at = np.searchsorted([step.since_us for step in memory], instants_us, side="right") - 1
    busy = [_busy_shares(requests, deployments, gpu_id, instants_us) for gpu_id in range(len(memory[0].used_bytes))]
    return tuple(
        GpuSample(
            time_us=time_us, gpu_id=gpu_id, memory_bytes=memory[step].used_bytes[gpu_id], busy_share=float(shares[row])
        )
        for row, (time_us, step) in enumerate(zip(instants_us.tolist(), step_at.tolist(), strict=True))
        for gpu_id, shares in enumerate(busy)
    )


def _busy_shares(
    requests: RequestTable, deployments: Sequence[DeploymentRecord], gpu_id: int, instants_us: Array
) -> Array:
    """Return the share of the time since the previous instant in which a GPU was busy."""
    mine = [
        deployment.deployment_id for deployment in deployments if deployment.plan and gpu_id in deployment.plan.gpu_ids
    ]
    ran = np.isin(requests.deployment_id, mine) & (requests.start_us != NOT_YET) & (requests.finish_us != NOT_YET)
    busy_us = _past(requests.start_us[ran], instants_us) - _past(requests.finish_us[ran], instants_us)
    shares: Array = np.diff(busy_us, prepend=0) / np.diff(instants_us, prepend=0)
    return np.clip(shares, 0.0, 1.0)  # recorded times are rounded, so consecutive requests may overlap by some µs


def _past(moments_us: Array, instants_us: Array) -> Array:
    """Return for each instant the sum of the times since all earlier moments."""
    ordered = np.sort(moments_us)
    count = np.searchsorted(ordered, instants_us, side="right")
    sums: Array = np.concatenate(([0], np.cumsum(ordered)))
    past: Array = count * instants_us - sums[count]
    return past
