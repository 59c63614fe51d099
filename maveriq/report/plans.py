"""Rankings of configurations, as tables and as JSON."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from maveriq.domain.cluster import Cluster
from maveriq.domain.deployments import EndpointSpec, Objective
from maveriq.domain.parallel import ParallelConfig
from maveriq.policy.configuration import Candidate, Ranking, RejectedConfig
from maveriq.report.formatting import NONE, figure, layer_list
from maveriq.report.tables import new_table
from maveriq.units import gib

_WIDE = 116
_UNITS = {
    Objective.MIN_COST: "cost\nGiB s",
    Objective.MIN_LATENCY: "latency\ns",
    Objective.MIN_MEMORY: "memory\nGiB",
    Objective.MIN_GPU_COST: "GPU cost\nGPU s",
}


def ranking_table(endpoint: EndpointSpec, ranking: Ranking, cluster: Cluster, *, top: int, width: int) -> Table:
    """Return the best configurations, best first.

    Args:
        endpoint: what was asked for.
        ranking: the answer, with at least one candidate.
        cluster: what it was fitted to.
        top: how many rows at most.
        width: of the terminal, in characters; wide ones also show the time to first token and total memory.
    """
    wide = width >= _WIDE
    shown, total = min(top, len(ranking.candidates)), len(ranking.candidates)
    table = new_table(
        f"{endpoint.model.name} for {endpoint.intent.objective.value} on {cluster.name}: {shown} of {total} configurations, "
        f"{endpoint.prompt_tokens} tokens in, {endpoint.output_tokens} out"
    )
    table.add_column("\n#", justify="right", style="dim")
    table.add_column("\nconfiguration", no_wrap=True)
    table.add_column("\nlayers", no_wrap=wide)
    for header in _headers(endpoint, wide=wide):
        table.add_column(header, justify="right", no_wrap=True)
    for place, candidate in enumerate(ranking.candidates[:top], start=1):
        table.add_row(
            str(place),
            str(candidate.configuration),
            layer_list(candidate.layer_split),
            *_cells(candidate, wide=wide),
            style="bold green" if place == 1 else "",
        )
    return table


def _headers(endpoint: EndpointSpec, *, wide: bool) -> list[str]:
    narrow = ["latency\ns", "TPOT\nms", "GiB\nper GPU", "acc.\n%", _UNITS[endpoint.intent.objective]]
    if not wide:
        return narrow
    return ["latency\ns", "first\ntoken s", "TPOT\nms", "memory\nGiB", "GiB\nper GPU", "accuracy\n%", narrow[-1]]


def _cells(candidate: Candidate, *, wide: bool) -> list[str]:
    service = candidate.service
    first_token = [f"{service.first_token_s:.3f}"] if wide else []
    memory = [f"{gib(candidate.memory_bytes):.1f}"] if wide else []
    return [
        f"{service.latency_s:.3f}",
        *first_token,
        f"{1e3 * service.tpot_s:.1f}",
        *memory,
        f"{gib(max(candidate.gpu_bytes)):.2f}",
        NONE if candidate.accuracy is None else f"{candidate.accuracy:g}",
        figure(candidate.score),
    ]


def left_out_table(ranking: Ranking, *, every: bool) -> Table:
    """Return why configurations were left out: a row per reason, or per configuration."""
    table = new_table(f"Left out: {len(ranking.left_out)} configurations")
    if every:
        table.add_column("configuration", no_wrap=True)
        table.add_column("reason")
        for left in ranking.left_out:
            table.add_row(
                str(left.configuration), Text(f"{left.reason}: {left.detail}" if left.detail else left.reason)
            )
        return table
    table.add_column("how many", justify="right")
    table.add_column("reason")
    table.add_column("for example")
    by_reason: dict[str, list[RejectedConfig]] = {}
    for left in ranking.left_out:
        by_reason.setdefault(left.reason, []).append(left)
    for reason, several in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        first = several[0]
        detail = f" {first.detail}" if first.detail else ""
        table.add_row(str(len(several)), Text(reason), Text(f"{first.configuration}{detail}"))
    return table


def ranking_json(endpoint: EndpointSpec, ranking: Ranking, cluster: Cluster) -> dict[str, Any]:
    """Return the whole ranking as plain values; times in s, memory in GiB, accuracy in percent."""
    return {
        "model": endpoint.model.name,
        "cluster": cluster.name,
        "intent": endpoint.intent.objective.value,
        "slo_s": endpoint.intent.slo_s,
        "prompt_tokens": endpoint.prompt_tokens,
        "output_tokens": endpoint.output_tokens,
        "note": ranking.note if ranking.candidates else ranking.why_empty(),
        "candidates": [
            {
                **_configuration_json(candidate.configuration),
                "layer_split": list(candidate.layer_split),
                "gpus": list(candidate.gpu_ids),
                "latency_s": candidate.service.latency_s,
                "first_token_s": candidate.service.first_token_s,
                "ttft_s": candidate.service.ttft_s,
                "tpot_s": candidate.service.tpot_s,
                "memory_gib": gib(candidate.memory_bytes),
                "gib_per_gpu": [gib(amount) for amount in candidate.gpu_bytes],
                "accuracy_percent": candidate.accuracy,
                "score": candidate.score,
            }
            for candidate in ranking.candidates
        ],
        "left_out": [
            {**_configuration_json(left.configuration), "reason": left.reason, "detail": left.detail}
            for left in ranking.left_out
        ],
    }


def _configuration_json(configuration: ParallelConfig) -> dict[str, Any]:
    return {
        "tp": configuration.tp,
        "pp": configuration.pp,
        "weights": configuration.weights.value,
        "kv": configuration.kv.value,
        "batch_size": configuration.batch_size,
    }
