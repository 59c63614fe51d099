"""Results as plain values, for `--json` and run.json. A figure that does not apply is null."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from maveriq.domain.records import NOT_YET, DeploymentRecord
from maveriq.report.metrics import Summary
from maveriq.report.verdict import Verdict
from maveriq.units import Micros, gib, seconds


def summary_json(summary: Summary, verdict: Verdict, deployments: Iterable[DeploymentRecord]) -> dict[str, Any]:
    """Return verdict, metrics and deployments in plain values, named as in their classes."""
    return {
        "verdict": msgspec.to_builtins(verdict),
        **msgspec.to_builtins(summary),
        "deployments": [_deployment(deployment) for deployment in deployments],
    }


def _deployment(deployment: DeploymentRecord) -> dict[str, Any]:
    ask, plan = deployment.ask, deployment.plan
    return {
        "deployment_id": deployment.deployment_id,
        "model": ask.model.name,
        "intent": ask.intent.objective.value,
        "slo_s": ask.intent.slo_s,
        "asked_s": seconds(ask.asked_us),
        "ready_s": _time_s(deployment.ready_us),
        "removed_s": _time_s(deployment.removed_us),
        "status": deployment.status,
        "reason": deployment.reason or (plan.note if plan else ""),
        "configuration": msgspec.to_builtins(plan.configuration) if plan else None,
        "layer_split": list(plan.layer_split) if plan else None,
        "gpus": list(plan.gpu_ids) if plan else None,
        "gib_per_gpu": [gib(amount) for amount in plan.gpu_bytes] if plan else None,
        "est_latency_s": (plan.est_latency_s or None) if plan else None,
        "est_memory_gib": (gib(plan.est_memory_bytes) or None) if plan else None,
    }


def _time_s(time_us: Micros) -> float | None:
    return None if time_us == NOT_YET else seconds(time_us)
