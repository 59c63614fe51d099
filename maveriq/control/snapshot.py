"""A snapshot of the controller for live views."""

from __future__ import annotations

from maveriq.control.controller import Controller
from maveriq.domain.progress import Progress
from maveriq.domain.requests import RequestStatus
from maveriq.units import Micros, seconds


def snapshot(controller: Controller, now_us: Micros, *, last_arrival_us: Micros, total: int) -> Progress:
    """Return what a live view shows now.

    Args:
        controller: the run under way.
        now_us: the present.
        last_arrival_us: when the last request of the workload arrives.
        total: requests of the workload.
    """
    ledger, fleet = controller.ledger, controller.fleet
    recent = ledger.recent_rows()
    latencies = sorted(latency_us for latency_us, _ in recent)
    met = [latency_us <= slo_us for latency_us, slo_us in recent if slo_us]
    return Progress(
        now_us=now_us,
        last_arrival_us=last_arrival_us,
        total=total,
        arrived=len(ledger),
        waiting=ledger.count(RequestStatus.WAITING),
        running=ledger.count(RequestStatus.RUNNING),
        completed=ledger.count(RequestStatus.COMPLETED),
        refused=ledger.count(RequestStatus.REFUSED),
        failed=ledger.count(RequestStatus.FAILED),
        recent_p50_s=_quantile_s(latencies, 0.50),
        recent_p95_s=_quantile_s(latencies, 0.95),
        recent_slo_attainment=sum(met) / len(met) if met else None,
        deployments=tuple(
            one.status(waiting=controller.queue.waiting(one.deployment_id)) for one in fleet.deployments.values()
        ),
        gpus=fleet.gpu_statuses(now_us),
    )


def _quantile_s(ordered_us: list[Micros], share: float) -> float | None:
    """Return the nearest-rank quantile of sorted durations, in seconds."""
    return seconds(ordered_us[min(len(ordered_us) - 1, int(share * len(ordered_us)))]) if ordered_us else None
