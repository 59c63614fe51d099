"""What the dashboard shows of the past: the last requests that ended, and samples of the cluster. Both are bounded.

The memory that this takes does not grow with the time, the requests, the deployments or the GPUs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maveriq.domain.progress import DeploymentStatus, GpuStatus, Progress
from maveriq.domain.records import EngineTable, RequestTable
from maveriq.exec.live_cluster import Outcome
from maveriq.report.page.cluster_charts import GpuHistory, gpu_groups
from maveriq.units import BYTES_PER_GIB, Micros

Array: TypeAlias = npt.NDArray[Any]

SAMPLE_EVERY_S = 5.0
WINDOW_S = 3600.0
MAX_SAMPLES = int(WINDOW_S / SAMPLE_EVERY_S)
MAX_REQUESTS = 20_000
MAX_DEPLOYMENTS = 256
"""Deployments whose past is kept: those with the highest IDs."""
MAX_ENGINES = 6
"""Continuous engines that are sampled by themselves; of more, those with most requests."""

_MAX_NAMES = 2 * MAX_REQUESTS  # of endpoints, some of which have no request here any more
_MAX_CHANGES = 32  # of the status of a deployment
_COLUMNS = (
    "endpoint_id", "arrival_us", "start_us", "first_token_us", "finish_us", "status", "prompt_tokens", "output_tokens",
    "slo_us",
)  # fmt: skip


class RecentRequests:
    """The last requests that ended (mutable)."""

    def __init__(self, capacity: int = MAX_REQUESTS) -> None:
        self._rows = np.zeros((capacity, len(_COLUMNS)), dtype=np.int64)
        self._added = 0
        self._models: dict[int, str] = {}

    def add(self, model: str, endpoint_id: int, outcome: Outcome, *, prompt_tokens: int, slo_us: Micros) -> None:
        """Add a request that has ended; the oldest makes room."""
        self._models[endpoint_id] = model
        if len(self._models) > _MAX_NAMES:
            known = set(np.unique(self._rows[:, 0]).tolist()) | {endpoint_id}
            self._models = {number: name for number, name in self._models.items() if number in known}
        self._rows[self._added % len(self._rows)] = (
            endpoint_id, outcome.arrival_us, outcome.start_us, outcome.first_token_us, outcome.finish_us,
            outcome.status.value, prompt_tokens, len(outcome.tokens), slo_us,
        )  # fmt: skip
        self._added += 1

    @property
    def models(self) -> dict[int, str]:
        """The models of their endpoints, in the order of endpoints; also of some that are forgotten."""
        return dict(sorted(self._models.items()))

    def table(self, since_us: Micros) -> RequestTable:
        """Return those that arrived from an instant on, with times counted from it."""
        rows = self._rows[: self._added].copy()
        columns = dict(zip(_COLUMNS, rows[rows[:, 1] >= since_us].T, strict=True))
        order = np.argsort(columns["arrival_us"], kind="stable")
        columns = {name: column[order] for name, column in columns.items()}
        for name in ("arrival_us", "start_us", "first_token_us", "finish_us"):
            columns[name] = np.where(columns[name] >= 0, columns[name] - since_us, columns[name])
        count, zeros = len(order), np.zeros(len(order), dtype=np.int64)
        return RequestTable(
            request_id=np.arange(1, count + 1),
            deployment_id=zeros,
            reason=zeros,
            cached_tokens=zeros,
            preemptions=zeros,
            steps=zeros,
            reasons=("",),
            **columns,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusSpan:
    """The status of a deployment from an instant on, until the next one."""

    since_us: Micros
    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentPast:
    """A deployment as it was last seen, and its statuses, the first at the first sample of it."""

    last: DeploymentStatus
    spans: Sequence[StatusSpan]
    seen_us: Micros


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The samples of the last hour, in arrays.

    Args:
        since_us: when the first was taken, on the cluster's clock.
        wall_s: when they were taken, Unix time.
        times_us: the same on the cluster's clock, counted from the first.
        waiting: requests in the queue.
        running: requests that engines run.
        completed: requests completed since the server started.
        unserved: requests refused or failed since then.
        gpus: load and memory.
        deployments: by ID.
        engines: of continuous engines; None without any.
    """

    since_us: Micros
    wall_s: Array
    times_us: Array
    waiting: Array
    running: Array
    completed: Array
    unserved: Array
    gpus: GpuHistory
    deployments: Sequence[DeploymentPast]
    engines: EngineTable | None

    @property
    def clock_scale(self) -> float:
        """Seconds of wall time for each second of the cluster's clock."""
        if len(self.times_us) < 2:
            return 1.0
        return float(self.wall_s[-1] - self.wall_s[0]) * 1e6 / max(1.0, float(self.times_us[-1] - self.times_us[0]))


@dataclass(frozen=True, slots=True)
class _Sample:
    wall_s: float
    now_us: Micros
    counts: tuple[int, int, int, int]
    gpus: Array  # (3, row): load in percent, memory and most memory in GiB
    engines: Array  # (engine, 4): deployment, running, waiting, KV use


class ClusterHistory:
    """Samples of the last hour (mutable)."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque(maxlen=MAX_SAMPLES)
        self._deployments: dict[int, DeploymentPast] = {}
        self._gpu_ids: tuple[int, ...] = ()
        self._rows: list[str] = []
        self._starts: Array = np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, progress: Progress, wall_s: float) -> None:
        """Add a sample, taken at a Unix time."""
        gpu_ids = tuple(gpu.gpu_id for gpu in progress.gpus)
        if gpu_ids != self._gpu_ids:
            self._samples.clear()
            self._gpu_ids = gpu_ids
            self._rows, self._starts = gpu_groups(gpu_ids)
        counts = (progress.waiting, progress.running, progress.completed, progress.refused + progress.failed)
        self._samples.append(
            _Sample(wall_s, progress.now_us, counts, self._gpu_rows(progress.gpus), _engine_rows(progress.deployments))
        )
        for deployment in progress.deployments:
            self._note(deployment, progress.now_us)
        self._forget(self._samples[0].now_us)

    def _gpu_rows(self, gpus: Sequence[GpuStatus]) -> Array:
        if not gpus:
            return np.zeros((3, 0))
        load = np.array([np.nan if gpu.down else 100 * gpu.load for gpu in gpus])
        memory = np.array([gpu.used_bytes / BYTES_PER_GIB for gpu in gpus])
        sizes = np.diff(self._starts, append=len(gpus))
        known = np.add.reduceat(np.isfinite(load), self._starts)
        mean_load = np.add.reduceat(np.nan_to_num(load), self._starts) / np.maximum(known, 1)
        return np.stack(
            [
                np.where(known > 0, mean_load, np.nan),
                np.add.reduceat(memory, self._starts) / sizes,
                np.maximum.reduceat(memory, self._starts),
            ]
        )

    def _note(self, deployment: DeploymentStatus, now_us: Micros) -> None:
        known = self._deployments.get(deployment.deployment_id)
        if known is None and deployment.status == "removed":
            return  # before the server started, or long ago
        spans = [] if known is None else list(known.spans)
        if known is not None and known.last.status == deployment.status == "removed":
            return
        if not spans or spans[-1].status != deployment.status:
            spans = [*spans[-_MAX_CHANGES + 1 :], StatusSpan(since_us=now_us, status=deployment.status)]
        self._deployments[deployment.deployment_id] = DeploymentPast(last=deployment, spans=spans, seen_us=now_us)

    def _forget(self, since_us: Micros) -> None:
        gone = [
            number
            for number, past in self._deployments.items()
            if past.last.status == "removed" and past.seen_us < since_us
        ]
        extra = len(self._deployments) - len(gone) - MAX_DEPLOYMENTS
        removed_first = sorted(
            self._deployments, key=lambda number: (self._deployments[number].last.status != "removed", number)
        )
        for number in {*gone, *(removed_first[: max(0, extra)])}:
            del self._deployments[number]

    def samples(self) -> Samples:
        """Return the samples, of which there is at least one."""
        samples = list(self._samples)
        counts = np.array([sample.counts for sample in samples])
        gpus = np.stack([sample.gpus for sample in samples], axis=2)
        since_us = samples[0].now_us
        times_us = np.array([sample.now_us for sample in samples]) - since_us
        return Samples(
            since_us=since_us,
            wall_s=np.array([sample.wall_s for sample in samples]),
            times_us=times_us,
            waiting=counts[:, 0],
            running=counts[:, 1],
            completed=counts[:, 2],
            unserved=counts[:, 3],
            gpus=GpuHistory(
                names=self._rows,
                times_us=times_us,
                load=gpus[0],
                memory_gib=gpus[1],
                most_gib=gpus[2],
                load_is="Share of the 120 s before in which each GPU was busy",
            ),
            deployments=[self._deployments[number] for number in sorted(self._deployments)],
            engines=_engine_table(samples),
        )


def _engine_rows(deployments: Sequence[DeploymentStatus]) -> Array:
    rows = [
        (engine.deployment_id, engine.running, engine.waiting, np.nan if engine.kv_use is None else engine.kv_use)
        for engine in deployments
        if engine.running is not None and engine.status != "removed"
    ]
    rows = sorted(rows, key=lambda row: -(row[1] + row[2]))[:MAX_ENGINES]
    return np.array(sorted(rows), dtype=float).reshape(-1, 4)


def _engine_table(samples: Sequence[_Sample]) -> EngineTable | None:
    since_us = samples[0].now_us
    times_us = np.concatenate([np.full(len(each.engines), each.now_us - since_us) for each in samples])
    rows = np.concatenate([each.engines for each in samples])
    if not len(rows):
        return None
    unknown = np.full(len(rows), np.nan)
    return EngineTable(
        time_us=times_us,
        deployment_id=rows[:, 0].astype(np.int64),
        running=rows[:, 1],
        waiting=rows[:, 2],
        kv_use=rows[:, 3],
        batch_tokens=unknown,
        step_us=unknown,
        busy_share=unknown,
    )
