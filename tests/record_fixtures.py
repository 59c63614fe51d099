"""Small run records for tests: built by hand, drawn by hypothesis, or from a single-server queue."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from maveriq.domain.deployments import EndpointSpec, Intent, Objective
from maveriq.domain.models import ModelSpec, WeightType
from maveriq.domain.parallel import DeploymentPlan, ParallelConfig
from maveriq.domain.records import NOT_YET, DeploymentRecord, GpuSample, RequestTable, RunRecord
from maveriq.domain.requests import FINAL_STATUSES, RequestStatus
from maveriq.units import bytes_from_gib, micros

COLUMNS = (
    "request_id", "endpoint_id", "deployment_id", "arrival_us", "start_us", "first_token_us", "finish_us",
    "status", "reason", "prompt_tokens", "output_tokens", "slo_us", "cached_tokens", "preemptions", "steps",
)  # fmt: skip
REASONS = ("", "not deployed", 'engine "3", of two, went down', "line one\nline two")


def model_spec(name: str, *, layers: int = 4) -> ModelSpec:
    return ModelSpec(
        name=name,
        architecture="llama",
        layers=layers,
        hidden_size=64,
        attention_heads=8,
        kv_heads=8,
        intermediate_size=256,
        vocab_size=1000,
    )


def deployment(
    deployment_id: int = 1,
    *,
    model: str = "tiny",
    endpoint_id: int = 1,
    gpu_ids: Sequence[int] = (0, 1),
    gib_per_gpu: float = 3.0,
    status: str = "up",
    note: str = "",
    slo_s: float | None = None,
) -> DeploymentRecord:
    spec = model_spec(model)
    plan = DeploymentPlan(
        model=spec,
        configuration=ParallelConfig(tp=len(gpu_ids), pp=1, weights=WeightType.INT4),
        gpu_ids=tuple(gpu_ids),
        gpu_bytes=(bytes_from_gib(gib_per_gpu),) * len(gpu_ids),
        est_latency_s=1.25,
        est_memory_bytes=bytes_from_gib(gib_per_gpu * len(gpu_ids)),
        note=note,
    )
    return DeploymentRecord(
        deployment_id=deployment_id,
        endpoint=EndpointSpec(
            endpoint_id=endpoint_id,
            model=spec,
            intent=Intent(objective=Objective.MIN_COST, slo_s=slo_s),
            requested_us=micros(10.0 * deployment_id),
            prompt_tokens=32,
            output_tokens=20,
        ),
        plan=plan,
        ready_us=micros(10.0 * deployment_id + 16.5),
        removed_us=NOT_YET,
        status=status,
        reason="",
    )


def rejected(deployment_id: int, *, model: str, endpoint_id: int, reason: str) -> DeploymentRecord:
    record = deployment(deployment_id, model=model, endpoint_id=endpoint_id)
    return replace(record, plan=None, ready_us=NOT_YET, status="rejected", reason=reason)


def table(rows: Iterable[Sequence[int]], *, reasons: tuple[str, ...] = REASONS) -> RequestTable:
    """Build a table from rows in the order of `COLUMNS`; the last ones are 0 where they are left out."""
    whole = [[*row, *(0,) * (len(COLUMNS) - len(row))] for row in rows]
    cells = np.array(whole, dtype=np.int64).reshape(-1, len(COLUMNS))
    return RequestTable(**{name: cells[:, i].copy() for i, name in enumerate(COLUMNS)}, reasons=reasons)


def run_record(
    requests: RequestTable,
    *,
    deployments: Sequence[DeploymentRecord] = (),
    gpu_samples: Sequence[GpuSample] = (),
    models: dict[int, str] | None = None,
    ended_us: int = micros(1000),
) -> RunRecord:
    return RunRecord(
        requests=requests,
        deployments=tuple(deployments) or (deployment(),),
        gpu_samples=tuple(gpu_samples),
        models=models or {1: "tiny"},
        ended_us=ended_us,
    )


def single_server(
    gaps_s: np.ndarray, services_s: np.ndarray, *, pauses: Sequence[tuple[float, float]] = ()
) -> RunRecord:
    """Serve requests one after another (Lindley's recursion); none starts in a pause (from, to)."""
    arrivals_us = np.rint(np.cumsum(gaps_s) * 1e6).astype(np.int64)
    services_us = np.maximum(1, np.rint(services_s * 1e6).astype(np.int64))
    free_us, starts_us = 0, []
    for arrival_us, service_us in zip(arrivals_us.tolist(), services_us.tolist(), strict=True):
        start_us = max(arrival_us, free_us)
        for since_s, until_s in pauses:
            if micros(since_s) <= start_us < micros(until_s):
                start_us = micros(until_s)
        starts_us.append(start_us)
        free_us = start_us + service_us
    count, starts = len(arrivals_us), np.array(starts_us, dtype=np.int64)
    fixed = dict.fromkeys(("endpoint_id", "deployment_id"), np.ones(count, dtype=np.int64))
    return run_record(
        RequestTable(
            request_id=np.arange(1, count + 1),
            **fixed,
            arrival_us=arrivals_us,
            start_us=starts,
            first_token_us=starts + services_us // 20,
            finish_us=starts + services_us,
            status=np.full(count, RequestStatus.COMPLETED.value),
            reason=np.zeros(count, dtype=np.int64),
            prompt_tokens=np.full(count, 40),
            cached_tokens=np.zeros(count, dtype=np.int64),
            output_tokens=np.full(count, 20),
            preemptions=np.zeros(count, dtype=np.int64),
            steps=np.zeros(count, dtype=np.int64),
            slo_us=np.zeros(count, dtype=np.int64),
            reasons=("",),
        ),
        ended_us=free_us + 1,
    )


@st.composite
def request_rows(draw: st.DrawFn, *, request_id: int) -> list[int]:
    status = draw(st.sampled_from(FINAL_STATUSES))
    arrival_us, queued_us, to_token_us, to_end_us = (draw(st.integers(0, 10**9)) for _ in range(4))
    started = status is RequestStatus.COMPLETED or (status is not RequestStatus.REFUSED and draw(st.booleans()))
    finished = status is RequestStatus.COMPLETED or (status is RequestStatus.FAILED and draw(st.booleans()))
    start_us = arrival_us + queued_us if started else NOT_YET
    first_us = start_us + to_token_us if started and draw(st.booleans()) else NOT_YET
    finish_us = arrival_us + queued_us + to_token_us + to_end_us + 1 if finished else NOT_YET
    endpoint_id = draw(st.integers(1, 2))
    deployment_id = endpoint_id if started else 0
    reason = 0 if status is RequestStatus.COMPLETED else draw(st.integers(0, len(REASONS) - 1))
    tokens = draw(st.integers(1, 500)), draw(st.integers(1, 500))
    slo_us = draw(st.one_of(st.just(0), st.integers(1, 3 * 10**9)))
    return [
        request_id, endpoint_id, deployment_id, arrival_us, start_us, first_us, finish_us, status.value, reason,
        *tokens, slo_us, draw(st.integers(0, 500)), draw(st.integers(0, 3)),
    ]  # fmt: skip


@st.composite
def runs(draw: st.DrawFn, *, min_size: int = 1) -> RunRecord:
    """Draw runs of two models (one named so that CSV must quote it) with requests of every kind."""
    size = draw(st.integers(min_size, 12))
    rows = sorted((draw(request_rows(request_id=i + 1)) for i in range(size)), key=lambda row: row[3])
    names = {1: "tiny", 2: 'big, "quoted"'}
    deployments = [
        deployment(1, model=names[1], gpu_ids=(0, 1)),
        deployment(2, model=names[2], endpoint_id=2, gpu_ids=(2,), gib_per_gpu=7.5),
    ]
    return run_record(table(rows), deployments=deployments, models=names, ended_us=10**10)
