"""The SLOs of an intent, as limits on estimates, and how messages write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from maveriq.domain.deployments import Intent
from maveriq.estimate.estimator import ServiceEstimate


@dataclass(frozen=True, slots=True, kw_only=True)
class SloLimit:
    """An SLO: its name, the time, how messages write it, and what must not exceed it."""

    name: str
    slo_s: float
    in_ms: bool
    time_of: Callable[[ServiceEstimate], float]
    itself_allowed: bool = True

    def __str__(self) -> str:
        return _time(self.slo_s, in_ms=self.in_ms)

    @property
    def reason(self) -> str:
        """Why a configuration that misses it is rejected."""
        return f"{'above' if self.itself_allowed else 'not below'} the {self.name}SLO of {self}"

    def met_by(self, service: ServiceEstimate) -> bool:
        """Return whether an estimate meets the SLO."""
        taken_s = self.time_of(service)
        return taken_s < self.slo_s or (self.itself_allowed and taken_s == self.slo_s)

    def least_of(self, services: Sequence[ServiceEstimate]) -> str:
        """Return the least time of some estimates, as messages write it."""
        return _time(min(map(self.time_of, services)), in_ms=self.in_ms)

    def taken(self, service: ServiceEstimate) -> str:
        """Return the time of an estimate, as messages write it."""
        return _time(self.time_of(service), in_ms=self.in_ms)


def slo_limits(intent: Intent, *, in_ms: bool = False) -> list[SloLimit]:
    """Return the SLOs of an intent; `in_ms` if messages give that on the latency in milliseconds."""
    limits = []
    if intent.slo_s is not None:
        whole: dict[str, Any] = {"time_of": lambda service: service.latency_s, "itself_allowed": False}
        limits.append(SloLimit(name="", slo_s=intent.slo_s, in_ms=in_ms, **whole))
    if intent.slo_ttft_s is not None:
        limits.append(
            SloLimit(name="TTFT ", slo_s=intent.slo_ttft_s, in_ms=True, time_of=lambda service: service.first_token_s)
        )
    if intent.slo_tpot_s is not None:
        limits.append(
            SloLimit(name="TPOT ", slo_s=intent.slo_tpot_s, in_ms=True, time_of=lambda service: service.tpot_s)
        )
    return limits


def first_missed(limits: Sequence[SloLimit], service: ServiceEstimate) -> SloLimit | None:
    """Return the first SLO that an estimate does not meet, None if it meets all."""
    return next((limit for limit in limits if not limit.met_by(service)), None)


def why_missed(limits: Sequence[SloLimit], services: Sequence[ServiceEstimate], *, share: float | None = None) -> str:
    """Return a note on SLOs that none of some estimates meets together.

    Args:
        limits: the SLOs.
        services: the estimates.
        share: of the requests, which the estimates are the slowest of; None where they are those of any request.
    """
    whose = "" if share is None else f" for {share:.0%} of the requests"
    if len(limits) == 1:
        limit = limits[0]
        return f"misses its {limit.name}SLO of {limit}{whose}: the fastest that fits takes {limit.least_of(services)}"
    slos = " and ".join(f"{limit.name or 'latency '}{limit}" for limit in limits)
    best = ", ".join(f"{limit.name or 'latency '}{limit.least_of(services)}" for limit in limits)
    return f"no configuration meets its SLOs of {slos} together{whose}: the least of those that fit are {best}"


def _time(duration_s: float, *, in_ms: bool) -> str:
    """Return a time in the unit that the user gave, exact to at least three digits."""
    value = 1e3 * duration_s if in_ms else duration_s
    digits = f"{value:.4g}" if in_ms or 0 < value < 0.001 else f"{value:.3f}"
    return f"{digits} {'ms' if in_ms else 's'}"
