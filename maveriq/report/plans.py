"""Rankings of configurations, as tables and as JSON values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from maveriq.domain.cluster import Cluster
from maveriq.domain.deployments import EndpointSpec, Objective
from maveriq.domain.models import KvType
from maveriq.domain.parallel import KV_SUFFIX, ParallelConfig
from maveriq.estimate.estimator import Basis
from maveriq.policy.configuration import Candidate, Ranking, RejectedConfig
from maveriq.report.formatting import NONE, figure, layer_list
from maveriq.report.plan_figures import PlanFigures, figures_of
from maveriq.report.results import WIDE
from maveriq.report.view import Column, Row, Table, Text, number_column, row
from maveriq.units import gib

_MAX_NOTES = 2

_UNITS = {
    Objective.MIN_COST: "cost\nGiB s",
    Objective.MIN_LATENCY: "latency\ns",
    Objective.MIN_MEMORY: "memory\nGiB",
    Objective.MIN_GPU_COST: "GPU cost\nGPU s",
}


def ranking_table(endpoint: EndpointSpec, ranking: Ranking, cluster: Cluster, *, top: int, width: int = WIDE) -> Table:
    """Return the best configurations, best first.

    Args:
        endpoint: the model, its intent and its tokens.
        ranking: the answer, with at least one candidate.
        cluster: the cluster that the configurations fit.
        top: maximum number of rows.
        width: in characters; from `WIDE` on, the table has all its columns.
    """
    wide = width >= WIDE
    equal = _equal_candidates(ranking.candidates)
    title = (
        f"{endpoint.model.name} for {endpoint.intent.objective.value} on {cluster.name}: "
        f"best {min(top, len(equal))} of {len(equal)}, "
        f"{endpoint.prompt_tokens} tokens in, {endpoint.output_tokens} out"
    )
    shown = equal[:top]
    figures = _figure_columns([candidates[0] for candidates in shown], endpoint, cluster, wide=wide)
    uneven = any(len(set(candidates[0].layer_split)) > 1 for candidates in shown)
    layers = [Column("\nlayers", wrap="never" if wide else "words")] if uneven else []
    columns = [
        Column("\n#", align="right", style="dim", wrap="words"),
        Column("\nconfiguration", wrap="never" if wide else "words"),
        *layers,
        *(number_column(header) for header, _ in figures),
    ]
    rows = [
        row(
            str(place),
            _configurations(candidates),
            *(layer_list(candidates[0].layer_split) for _ in layers),
            *(cell(candidates[0]) for _, cell in figures),
            style="bold green" if place == 1 else "",
        )
        for place, candidates in enumerate(shown, start=1)
    ]
    return Table(title, columns, rows)


def _equal_candidates(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Return the candidates in their order, those together that differ in their formats alone and in no estimate.

    A 16-bit cache stays apart from those of 8 bits, so that the formats of a group are all combinations.
    """
    groups: dict[object, list[Candidate]] = {}
    for candidate in candidates:
        at = candidate.configuration
        where = (at.gpu, at.tp, at.pp, at.ep, at.network_hops, candidate.layer_split)
        key = (*where, candidate.service, candidate.memory_bytes, candidate.accuracy)
        apart = (at.weights, at.kv) if candidate.note else (at.kv is KvType.NATIVE,)
        groups.setdefault((*key, *apart), []).append(candidate)
    return list(groups.values())


def _configurations(equal: Sequence[Candidate]) -> str:
    """Return the degrees, and the formats that are equal: `TP 8 x PP 1 int4/int4_gptq+kvfp8/kv8`."""
    first = equal[0].configuration
    weights = dict.fromkeys(candidate.configuration.weights.value for candidate in equal)
    kv = dict.fromkeys(KV_SUFFIX[candidate.configuration.kv].removeprefix("+") for candidate in equal)
    stored, cached = "/".join(weights), "/".join(kv)
    own = f"{first.weights}{KV_SUFFIX[first.kv]}"
    return str(first).replace(own, f"{stored}+{cached}" if cached else stored)


def _figure_columns(
    shown: Sequence[Candidate], endpoint: EndpointSpec, cluster: Cluster, *, wide: bool
) -> list[tuple[str, Callable[[Candidate], str]]]:
    """Return headers and cells of the columns of figures; what no candidate has gets no column."""

    def price(candidate: Candidate) -> str:
        return figure(figures_of(candidate, endpoint, cluster).usd_per_million_tokens)

    bases = {candidate.service.basis for candidate in shown}
    columns = [
        ("latency\ns", lambda candidate: f"{candidate.service.latency_s:.3f}", True),
        ("90 % of\nlatencies", _interval, any(candidate.service.interval for candidate in shown)),
        ("first\ntoken s", lambda candidate: f"{candidate.service.first_token_s:.3f}", wide or _has_ttft_slo(endpoint)),
        ("TPOT\nms", lambda candidate: f"{1e3 * candidate.service.tpot_s:.1f}", True),
        ("GiB\nper GPU", lambda candidate: f"{gib(max(candidate.gpu_bytes)):.2f}", True),
        ("acc.\n%", _accuracy, any(candidate.accuracy is not None for candidate in shown)),
        ("$ per 1M\ntokens", price, any(price(candidate) != NONE for candidate in shown)),
        (_UNITS[endpoint.intent.objective], lambda candidate: figure(candidate.score), True),
        ("rests\non", lambda candidate: candidate.service.basis or NONE, bases != {None} and (wide or len(bases) > 1)),
    ]
    return [(header, cell) for header, cell, used in columns if used]


def _has_ttft_slo(endpoint: EndpointSpec) -> bool:
    return endpoint.intent.slo_ttft_s is not None


def _interval(candidate: Candidate) -> str:
    service = candidate.service
    if service.interval is None:
        return NONE
    return "-".join(f"{bound * service.latency_s:.3g}" for bound in service.interval)


def _accuracy(candidate: Candidate) -> str:
    return NONE if candidate.accuracy is None else f"{candidate.accuracy:g}"


def summary_line(endpoint: EndpointSpec, ranking: Ranking, cluster: Cluster) -> str:
    """Return the best configuration and its figures in one line.

    Args:
        endpoint: the model, its intent and its tokens.
        ranking: the answer, with at least one candidate.
        cluster: the cluster that the configurations fit.
    """
    best = ranking.candidates[0]
    service, figures = best.service, figures_of(best, endpoint, cluster)
    interval = f" (90 % within {_interval(best)} s)" if service.interval else ""
    times = f"first token {1e3 * service.first_token_s:.0f} ms, TPOT {1e3 * service.tpot_s:.1f} ms"
    each = f"{figures.output_tokens_per_s:,.0f} output tokens/s each"
    if figures.usd_per_hour is not None:
        each += f" for ${figures.usd_per_hour:,.2f} an hour, ${figure(figures.usd_per_million_tokens)} per million"
    room = f"room for {figures.deployments} such engine{'' if figures.deployments == 1 else 's'}"
    parts = [
        f"{cluster.name}: {endpoint.model.name} as {best.configuration}, {room}",
        f"{times}, latency {service.latency_s:.3g} s{interval}",
        each,
    ]
    if service.basis is not None:
        parts.append(f"rests on {_BASES[service.basis]}")
    return "; ".join(parts)


_BASES = {
    Basis.MEASURED: "measured models",
    Basis.OPERATORS: "measured operators",
    Basis.DATA_SHEET: "the data sheet",
}


def surprise_notes(ranking: Ranking, *, top: int) -> list[Text]:
    """Return the notes on the best configurations, with their places in the table; at most `_MAX_NOTES`."""
    noted = [(place, candidate) for place, candidate in enumerate(ranking.candidates[:top], start=1) if candidate.note]
    lines = [
        Text.of(("note ", "bold yellow"), f"#{place} {candidate.configuration}: {candidate.note}")
        for place, candidate in noted[:_MAX_NOTES]
    ]
    more = len(noted) - _MAX_NOTES
    return [*lines, Text(f"and {more} more like it; --json has every note", "dim")] if more > 0 else lines


def rejected_table(ranking: Ranking, *, every: bool) -> Table:
    """Return why configurations were rejected: a row per reason, or per configuration if `every`."""
    title = f"Rejected: {len(ranking.rejected)} configurations"
    if every:
        return Table(
            title,
            [Column("configuration"), Column("reason", wrap="words")],
            [row(str(rejected.configuration), _full_reason(rejected)) for rejected in ranking.rejected],
        )
    by_reason: dict[str, list[RejectedConfig]] = {}
    for rejected in ranking.rejected:
        by_reason.setdefault(rejected.reason, []).append(rejected)
    most_common_first = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    return Table(
        title,
        [
            Column("how many", align="right", wrap="words"),
            Column("reason", wrap="words"),
            Column("for example", wrap="words"),
        ],
        [_reason_row(reason, rejected) for reason, rejected in most_common_first],
    )


def _full_reason(rejected: RejectedConfig) -> str:
    return f"{rejected.reason}: {rejected.detail}" if rejected.detail else rejected.reason


def _reason_row(reason: str, rejected: Sequence[RejectedConfig]) -> Row:
    example = rejected[0]
    return row(str(len(rejected)), reason, f"{example.configuration} {example.detail}".rstrip())


def ranking_json(endpoint: EndpointSpec, ranking: Ranking, cluster: Cluster) -> dict[str, Any]:
    """Return the whole ranking as plain values; times in s, memory in GiB, accuracy in percent."""
    return {
        "model": endpoint.model.name,
        "cluster": cluster.name,
        "intent": endpoint.intent.objective.value,
        "slo_s": endpoint.intent.slo_s,
        "slo_ttft_s": endpoint.intent.slo_ttft_s,
        "slo_tpot_s": endpoint.intent.slo_tpot_s,
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
                "note": candidate.note,
                **_estimate_json(candidate),
                **_figures_json(figures_of(candidate, endpoint, cluster)),
            }
            for candidate in ranking.candidates
        ],
        "rejected": [
            {**_configuration_json(rejected.configuration), "reason": rejected.reason, "detail": rejected.detail}
            for rejected in ranking.rejected
        ],
    }


def _estimate_json(candidate: Candidate) -> dict[str, Any]:
    service = candidate.service
    interval = service.interval and [bound * service.latency_s for bound in service.interval]
    return {"rests_on": service.basis, "latency_interval_s": interval}


def _figures_json(figures: PlanFigures) -> dict[str, Any]:
    return {
        "output_tokens_per_s": figures.output_tokens_per_s,
        "usd_per_hour": figures.usd_per_hour,
        "usd_per_million_output_tokens": figures.usd_per_million_tokens,
        "usd_per_1000_requests": figures.usd_per_1000_requests,
        "deployments": figures.deployments,
    }


def _configuration_json(configuration: ParallelConfig) -> dict[str, Any]:
    return {
        "tp": configuration.tp,
        "pp": configuration.pp,
        "weights": configuration.weights.value,
        "kv": configuration.kv.value,
        "batch_size": configuration.batch_size,
        **({"ep": configuration.ep} if configuration.ep > 1 else {}),
        **({"gpu": configuration.gpu} if configuration.gpu else {}),
        **({"network_hops": configuration.network_hops} if configuration.network_hops else {}),
    }
