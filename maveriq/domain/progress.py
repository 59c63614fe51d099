"""A snapshot of a run under way, for live views of simulated and real runs alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from maveriq.units import Bytes, Micros


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentStatus:
    """A deployment as a live view shows it; `status` and `reason` as in `DeploymentRecord`.

    `restarts` counts the engines started for it after the first. `running` and `kv_use` are of engines that batch
    continuously, None for others: requests that its engine has admitted, and the share of KV blocks that they hold.
    """

    deployment_id: int
    endpoint_id: int
    model: str
    configuration: str
    layer_split: tuple[int, ...]
    gpu_ids: tuple[int, ...]
    status: str
    waiting: int
    completed: int
    reason: str = ""
    restarts: int = 0
    running: int | None = None
    kv_use: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuStatus:
    """A GPU's memory and its load over the last 120 s (0 to 1)."""

    gpu_id: int
    used_bytes: Bytes
    capacity_bytes: Bytes
    load: float
    down: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Counts so far, and figures over the most recent completions.

    `recent_*` cover the last completions (at most 1,000): latency quantiles in seconds, None
    before the first; SLO attainment as a share, None where no request has an SLO.
    `last_arrival_us` is when the last request of the workload arrives.
    """

    now_us: Micros
    last_arrival_us: Micros
    total: int
    arrived: int
    waiting: int
    running: int
    completed: int
    refused: int
    failed: int
    recent_p50_s: float | None
    recent_p95_s: float | None
    recent_slo_attainment: float | None
    deployments: tuple[DeploymentStatus, ...]
    gpus: tuple[GpuStatus, ...]


class Watcher(Protocol):
    """Watches a run while it goes, for instance a live view."""

    def wants_update(self) -> bool:
        """Return whether `update` should be called now; called often, so it must be cheap."""

    def update(self, progress: Progress) -> None:
        """Show the progress."""
