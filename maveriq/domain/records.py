"""Records: what happened, in one schema for simulated and real runs (SPEC 10)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from maveriq.domain.deployments import EndpointSpec
from maveriq.domain.parallel import DeploymentPlan
from maveriq.domain.requests import FINAL_STATUSES, RequestStatus
from maveriq.errors import InvariantError
from maveriq.units import Bytes, Micros

if TYPE_CHECKING:
    import numpy as np

NOT_YET = -1
"""Marks a time that never came (a request that never started, an engine never ready)."""

COLUMN_MEANINGS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "requests.csv": {
            "request_id": "number of the request in its workload",
            "endpoint": "number of the endpoint: 1 for the first model of the set",
            "deployment_id": "the deployment that served it, or that it waited for; empty without one",
            "model": "name of the model",
            "arrival_s": "when it was sent",
            "start_s": "when its engine began with it",
            "first_token_s": "when its first token came",
            "finish_s": "when it ended",
            "status": "`completed`, `refused`, `failed` or `unfinished`",
            "reason": "why it did not complete",
            "prompt_tokens": "tokens of the prompt",
            "cached_tokens": "of these, tokens found in the prefix cache",
            "output_tokens": "tokens of the output; of a run on engines, those that came",
            "preemptions": "how often a continuous engine dropped what was computed of it",
            "queue_s": "`start_s` less `arrival_s`",
            "service_s": "`finish_s` less `start_s`",
            "latency_s": "`finish_s` less `arrival_s`",
            "ttft_s": "`first_token_s` less `arrival_s`",
            "tpot_s": "`finish_s` less `first_token_s`, over output tokens less 1; empty under two tokens",
            "slo_s": "its latency SLO",
            "slo_met": "`true` if `latency_s` is at most `slo_s`",
            "steps": "steps of a continuous engine that computed something of it",
        },
        "deployments.csv": {
            "deployment_id": "number of the deployment; empty for an endpoint that was rejected",
            "model": "name of the model",
            "intent": "what the endpoint minimises",
            "slo_s": "latency SLO that it was planned for",
            "requested_s": "when the endpoint was requested",
            "ready_s": "when its engine was up",
            "removed_s": "when it was removed",
            "status": "`up`, `loading`, `waiting`, `down`, `rejected` or `removed` at the end of the run",
            "reason": "why it was rejected or lost, or a note on the decision",
            "tp": "tensor parallelism: GPUs of a stage",
            "pp": "pipeline parallelism: stages",
            "layer_split": "layers of each stage",
            "weights": "format of the weights",
            "kv": "format of the KV cache",
            "batch_size": "most requests in a batch",
            "gpus": "its GPUs, by stage and rank",
            "gib_per_gpu": "memory that it holds of each of them, in the same order",
            "est_latency_s": "latency of a typical request, as the planner estimated it",
            "est_memory_gib": "memory over all GPUs, as the planner estimated it",
        },
        "gpus.csv": {
            "time_s": "time of the sample",
            "gpu": "number of the GPU",
            "memory_gib": "memory in use",
            "busy_share": "share of the time since the last sample in which it was busy",
        },
        "engines.csv": {
            "time_s": "end of the interval, which begins at the row before of the same deployment",
            "deployment_id": "the deployment",
            "running": "requests that the engine ran, as a mean over the interval",
            "waiting": "requests that waited in the engine, as a mean over the interval",
            "kv_use": "share of its KV blocks that requests held",
            "batch_tokens": "tokens computed in a step",
            "step_s": "time of a step",
            "busy_share": "share of the interval in which a step ran",
        },
        "itl.csv": {
            "endpoint": "number of the endpoint",
            "itl_s": "time between a token of a request and its next",
            "tokens": "how many tokens came so long after the one before",
        },
    }
)
"""The columns of the files of a run, in their order, and what each says. Times are seconds since the run's start."""

REQUEST_COLUMNS = tuple(COLUMN_MEANINGS["requests.csv"])
DEPLOYMENT_COLUMNS = tuple(COLUMN_MEANINGS["deployments.csv"])
GPU_COLUMNS = tuple(COLUMN_MEANINGS["gpus.csv"])
ENGINE_COLUMNS = tuple(COLUMN_MEANINGS["engines.csv"])
ITL_COLUMNS = tuple(COLUMN_MEANINGS["itl.csv"])


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTable:
    """All requests of a run, a column each, in the order of arrival.

    Times are microseconds since the run's start, `NOT_YET` for what never happened.
    `deployment_id` is 0 where the endpoint had no deployment; `slo_us` is 0 where there is no SLO.
    `reason` is an index into `reasons` (0: none). `cached_tokens` of the prompt were in the prefix cache, and
    `preemptions` counts how often the request lost what was computed of it; both are 0 with exclusive engines.
    `steps` of its engine computed something of it, tokens that were dropped aside; 0 where that is not known.
    """

    request_id: np.ndarray[Any, Any]
    endpoint_id: np.ndarray[Any, Any]
    deployment_id: np.ndarray[Any, Any]
    arrival_us: np.ndarray[Any, Any]
    start_us: np.ndarray[Any, Any]
    first_token_us: np.ndarray[Any, Any]
    finish_us: np.ndarray[Any, Any]
    status: np.ndarray[Any, Any]
    reason: np.ndarray[Any, Any]
    prompt_tokens: np.ndarray[Any, Any]
    cached_tokens: np.ndarray[Any, Any]
    output_tokens: np.ndarray[Any, Any]
    preemptions: np.ndarray[Any, Any]
    steps: np.ndarray[Any, Any]
    slo_us: np.ndarray[Any, Any]
    reasons: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.request_id)

    def counts(self) -> dict[RequestStatus, int]:
        """Return how many requests ended in each final status.

        Raises:
            InvariantError: a request has no final status (conservation is broken).
        """
        counts = {status: int((self.status == status.value).sum()) for status in FINAL_STATUSES}
        if sum(counts.values()) != len(self):
            raise InvariantError(f"{len(self)} requests arrived but {sum(counts.values())} ended; some were lost")
        return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentRecord:
    """One deployment: its endpoint, its plan and its final status.

    `plan` is None where it was rejected; `reason` then says why. Times are microseconds,
    `NOT_YET` where they never came. `status` is one of waiting, loading, up, down, removed, rejected.
    """

    deployment_id: int
    endpoint: EndpointSpec
    plan: DeploymentPlan | None
    ready_us: Micros
    removed_us: Micros
    status: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSample:
    """Memory at an instant and the share of the time since the last sample that a GPU was busy."""

    time_us: Micros
    gpu_id: int
    memory_bytes: Bytes
    busy_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTable:
    """Engines that batch continuously over time, a column each, in the order of time, then of deployments.

    Each row covers the time since the row before of the same deployment. All are means over that time.

    Args:
        time_us: its end.
        deployment_id: whose engine.
        running: requests that had been admitted and had not ended.
        waiting: requests on their way to the engine, in its queue, or preempted.
        kv_use: share of the KV blocks that requests held.
        batch_tokens: tokens of a step; NaN where no step ran.
        step_us: how long a step took; NaN likewise.
        busy_share: share of the time in which a step ran.
    """

    time_us: np.ndarray[Any, Any]
    deployment_id: np.ndarray[Any, Any]
    running: np.ndarray[Any, Any]
    waiting: np.ndarray[Any, Any]
    kv_use: np.ndarray[Any, Any]
    batch_tokens: np.ndarray[Any, Any]
    step_us: np.ndarray[Any, Any]
    busy_share: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.time_us)


@dataclass(frozen=True, slots=True, kw_only=True)
class ItlTable:
    """The distribution of inter-token latencies, a column each, by endpoint, then by latency.

    Args:
        endpoint_id: whose requests.
        itl_us: time since the request's token before; whole microseconds.
        tokens: how many tokens came after so long.
    """

    endpoint_id: np.ndarray[Any, Any]
    itl_us: np.ndarray[Any, Any]
    tokens: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.itl_us)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """All records of a run: the input of metrics, files and comparisons.

    `models` maps endpoint ids to model names (refused requests have an endpoint, not always a
    deployment). `ended_us` is when the run stopped. `engines` and `itl` are None where no engine batches
    continuously.
    """

    requests: RequestTable
    deployments: tuple[DeploymentRecord, ...]
    gpu_samples: tuple[GpuSample, ...]
    models: dict[int, str]
    ended_us: Micros
    engines: EngineTable | None = None
    itl: ItlTable | None = None
