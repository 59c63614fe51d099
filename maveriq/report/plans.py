"""Rankings of configurations, as tables and as JSON values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from maveriq.domain.cluster import Cluster
from maveriq.domain.deployments import EndpointSpec
from maveriq.domain.models import KvType
from maveriq.domain.parallel import KV_SUFFIX, ParallelConfig
from maveriq.estimate.estimator import Basis
from maveriq.policy.configuration import Candidate, Ranking, RejectedConfig
from maveriq.policy.scores import ScoreUnit
from maveriq.report.formatting import NONE, figure, layer_list
from maveriq.report.plan_figures import PlanFigures, figures_of
from maveriq.report.results import WIDE
from maveriq.report.view import Column, Row, Table, Text, natural_width, number_column, row
from maveriq.units import gib

_MAX_NOTES = 2
_LEAST = {
    ScoreUnit.USD_PER_MILLION_TOKENS: "least $/1M tokens",
    ScoreUnit.GPU_SECONDS: "least GPU-seconds",
    ScoreUnit.GIB_SECONDS: "least GiB s, latency x memory",
    ScoreUnit.SECONDS: "least latency",
    ScoreUnit.GIB: "least memory",
}
# A score that another column shows has none of its own.
_SCORE_HEADERS = {
    ScoreUnit.GPU_SECONDS: "cost\nGPU s",
    ScoreUnit.GIB_SECONDS: "cost\nGiB s",
    ScoreUnit.GIB: "memory\nGiB",
}


_KEPT = 9  # the importance of columns that are never left out


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """A column of a ranking: its header and its cells; where a terminal is narrow, the least important goes first."""

    header: str
    cell: Callable[[Candidate], str]
    importance: int = _KEPT
    used: bool = True


def ranking_table(endpoint: EndpointSpec, ranking: Ranking, cluster: Cluster, *, top: int, width: int = WIDE) -> Table:
    """Return the best configurations, best first.

    Args:
        endpoint: the model, its intent and its tokens.
        ranking: the answer, with at least one candidate.
        cluster: the cluster that the configurations fit.
        top: maximum number of rows.
        width: in characters. Where rows do not fit, configurations take two lines, then columns are left out.
    """
    equal = _equal_candidates(ranking.candidates)
    shown = equal[:top]
    columns = _figure_columns(
        [candidates[0] for candidates in shown], endpoint, cluster, ranking.score_unit, wide=width >= WIDE
    )
    batch = f", {endpoint.batch_size} at a time" if endpoint.batch_size > 1 else ""
    order = "fastest first" if ranking.note else _LEAST[ranking.score_unit]
    title = (
        f"{endpoint.model.name} on {cluster.name}: best {len(shown)} of {len(equal)} for "
        f"{endpoint.intent.objective.value} ({order})\n"
        f"{endpoint.prompt_tokens} tokens in, {endpoint.output_tokens} out{batch}"
    )
    while True:
        for lines, dense in ((1, False), (1, True), (2, True)):
            table = _table_of(title, shown, columns, lines=lines, dense=dense)
            if natural_width(table) <= width:
                return table
        least = min(columns, key=lambda column: column.importance)
        if least.importance == _KEPT:
            return table
        columns.remove(least)


def _table_of(
    title: str, shown: Sequence[Sequence[Candidate]], columns: Sequence[_Shown], *, lines: int, dense: bool
) -> Table:
    rows = [
        row(
            str(place),
            _configurations(candidates, lines=lines),
            *(column.cell(candidates[0]) for column in columns),
            style="bold green" if place == 1 else "",
        )
        for place, candidates in enumerate(shown, start=1)
    ]
    headers = [
        Column("\n#", align="right", style="dim"),
        Column("\nconfiguration", wrap="fold"),
        *(number_column(column.header) for column in columns),
    ]
    return Table(title, headers, rows, dense=dense)


def _equal_candidates(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Return the candidates in their order, those together that differ in their formats alone and in no estimate.

    A 16-bit cache stays apart from those of 8 bits, so that the formats of a group are all combinations.
    """
    groups: dict[object, list[Candidate]] = {}
    for candidate in candidates:
        at = candidate.configuration
        where = (at.gpu, at.tp, at.pp, at.ep, at.network_hops, candidate.layer_split)
        key = (*where, candidate.service, candidate.memory_bytes, candidate.accuracy)
        note = candidate.note.replace(at.weights, "")  # notes name the format that they speak of
        groups.setdefault((*key, at.kv is KvType.NATIVE, note), []).append(candidate)
    return list(groups.values())


def _configurations(equal: Sequence[Candidate], *, lines: int) -> str:
    """Return the degrees, and the formats that are equal: `TP 8 int4/int4_gptq+kvfp8/kv8`.

    What all rows share is left out: the batch, and a single stage. With two lines, they are as equally long as words
    allow.
    """
    first = equal[0].configuration
    weights = dict.fromkeys(candidate.configuration.weights.value for candidate in equal)
    kv = dict.fromkeys(KV_SUFFIX[candidate.configuration.kv].removeprefix("+") for candidate in equal)
    degrees = (("TP", first.tp, True), ("PP", first.pp, first.pp > 1), ("EP", first.ep, first.ep > 1))
    parts = [
        " x ".join(f"{name} {degree}" for name, degree, used in degrees if used),
        " " + "/".join(weights),
        "+" + "/".join(kv) if any(kv) else "",
        f" on {first.gpu}" if first.gpu else "",
        " across nodes" if first.network_hops else "",
    ]
    halves = [("".join(parts[:at]), "".join(parts[at:]).strip()) for at in range(1, len(parts) + 1)]
    return min(("\n".join(half).strip() for half in halves), key=_widest) if lines > 1 else "".join(parts)


def _widest(text: str) -> int:
    return max(map(len, text.split("\n")))


def _figure_columns(
    shown: Sequence[Candidate], endpoint: EndpointSpec, cluster: Cluster, unit: ScoreUnit, *, wide: bool
) -> list[_Shown]:
    """Return the columns of figures; what no candidate has gets no column."""

    def price(candidate: Candidate) -> str:
        return figure(figures_of(candidate, endpoint, cluster).usd_per_million_tokens)

    bases = {candidate.service.basis for candidate in shown}
    priced_by = unit is ScoreUnit.USD_PER_MILLION_TOKENS
    columns = [
        _Shown(
            header="\nlayers",
            cell=lambda candidate: layer_list(candidate.layer_split),
            importance=0,
            used=any(len(set(candidate.layer_split)) > 1 for candidate in shown),
        ),
        _Shown(header="latency\ns", cell=lambda candidate: f"{candidate.service.latency_s:.3f}"),
        _Shown(
            header="90 % of\nlatencies", cell=_interval, used=any(candidate.service.interval for candidate in shown)
        ),
        _Shown(
            header="TTFT\nms",
            cell=lambda candidate: figure(1e3 * candidate.service.first_token_s),
            used=wide or endpoint.intent.slo_ttft_s is not None,
        ),
        _Shown(header="TPOT\nms", cell=lambda candidate: f"{1e3 * candidate.service.tpot_s:.1f}"),
        _Shown(header="GiB/\nGPU", cell=lambda candidate: f"{gib(max(candidate.gpu_bytes)):.2f}", importance=2),
        _Shown(header="acc.\n%", cell=_accuracy, used=any(candidate.accuracy is not None for candidate in shown)),
        _Shown(
            header="$/1M\ntokens",
            cell=price,
            importance=_KEPT if priced_by else 1,
            used=any(price(candidate) != NONE for candidate in shown),
        ),
        _Shown(
            header=_SCORE_HEADERS.get(unit, ""), cell=lambda candidate: figure(candidate.score),
            used=unit in _SCORE_HEADERS,
        ),
        _Shown(
            header="rests\non",
            cell=lambda candidate: candidate.service.basis or NONE,
            used=bases != {None} and (wide or len(bases) > 1),
        ),
    ]  # fmt: skip
    return [column for column in columns if column.used]


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
    shown = _equal_candidates(ranking.candidates)[:top]
    noted = [(place, candidates[0]) for place, candidates in enumerate(shown, start=1) if candidates[0].note]
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
        "batch_size": endpoint.batch_size,
        "score_unit": ranking.score_unit,
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
