"""The report of one run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from maveriq.domain.records import DeploymentRecord, RunRecord
from maveriq.report.formatting import NONE, figure, gpu_list, layer_list, share
from maveriq.report.metrics import Counts, Figures, Summary
from maveriq.report.page.charts import Chart
from maveriq.report.page.cluster_charts import deployments_chart, engine_charts, gpu_charts, gpu_history
from maveriq.report.page.page import Card, Page, Section, Snippet, Verdict
from maveriq.report.page.run_charts import (
    distribution_charts,
    latency_over_time_chart,
    requests_chart,
    slo_charts,
    styles_of,
)
from maveriq.report.results import STATUS_STYLES, summary_tables
from maveriq.report.saturation import Saturation, SaturationLabel
from maveriq.report.view import Column, Table, Text, number_column, row
from maveriq.units import gib

TONES = {
    SaturationLabel.STABLE: "good",
    SaturationLabel.BACKLOGGED: "fair",
    SaturationLabel.OVERLOADED: "poor",
}
HEADLINES = {
    SaturationLabel.STABLE: "Stable: the cluster keeps up with the requests",
    SaturationLabel.BACKLOGGED: "Backlogged: the cluster fell behind at times",
    SaturationLabel.OVERLOADED: "Overloaded: the cluster cannot keep up",
}
_NO_LIMIT = 10**6
"""A width, in characters, in which every table fits: a page scrolls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResults:
    """What a report shows of a run.

    Args:
        name: what the run is called.
        record: what happened.
        summary: its metrics.
        saturation: whether the cluster kept up.
        meta: what led to it, as in run.json.
    """

    name: str
    record: RunRecord
    summary: Summary
    saturation: Saturation
    meta: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """What kind of run it is: simulated, run, recorded; "" where that is unknown."""
        return str(self.meta.get("kind") or "")


class ReportableRun(Protocol):
    """A run that reports can show, such as `maveriq.Run`."""

    def results(self, name: str = "") -> RunResults:
        """Return what reports show of it; `name` is what they call it."""


def run_page(run: RunResults) -> Page:
    """Return the report of a run."""
    record, styles = run.record, styles_of(run.record)
    reasons = _reasons_table(run)
    sections = [
        Section(
            section_id="slos",
            title="SLOs and figures by model",
            charts=list(slo_charts(run.summary, styles)),
            tables=[*summary_tables(run.summary, wide=True, width=_NO_LIMIT), *reasons],
        ),
        Section(
            section_id="latency",
            title="Latency",
            charts=[*distribution_charts(record, run.summary, styles), *latency_over_time_chart(record)],
        ),
        Section(section_id="load", title="Requests over time", charts=[requests_chart(record)]),
        Section(
            section_id="cluster",
            title="GPUs and deployments over time",
            charts=[*deployments_chart(record, styles), *_gpu_charts(record)],
        ),
        Section(section_id="engines", title="Engines over time", charts=list(_engine_charts(record, styles))),
        Section(
            section_id="deployments",
            title="Deployments",
            tables=[deployments_table(record.deployments, policy=policy_of(run.meta))],
        ),
    ]
    return Page(
        title=f"maveriq report: {run.name}",
        subtitle=" · ".join(filter(None, (run.kind, str(run.meta.get("workload", ""))))),
        kind="run",
        verdicts=[verdict_of(run)],
        cards=list(cards_of(run.summary)),
        sections=[section for section in sections if section.charts or section.tables],
        notes=[str(note) for note in run.meta.get("notes", ())],
        snippets=list(snippets_of(run)),
        written_by=versions_of(run.meta),
    )


def _gpu_charts(record: RunRecord) -> Iterator[Chart]:
    if record.gpu_samples:
        yield from gpu_charts(gpu_history(record.gpu_samples))


def _engine_charts(record: RunRecord, styles: Mapping[str, int]) -> Iterator[Chart]:
    names = {item.deployment_id: item.endpoint.model.name for item in record.deployments}
    return engine_charts(record.engines, names, styles)


def verdict_of(run: RunResults, name: str = "") -> Verdict:
    """Return whether a run kept up as a verdict; `name` is put in front where there are several runs."""
    saturation, counts = run.saturation, run.summary.overall.counts
    headline, tone = HEADLINES[saturation.label], TONES[saturation.label]
    sentences = [saturation.sentence, *saturation.bottlenecks.sentences()]
    missing = counts.scheduled - counts.completed
    if not counts.scheduled:
        headline, tone, sentences = "No request arrived", "neutral", []
    elif not counts.completed:
        headline, tone, sentences = "No request completed", "poor", [f"{counts_text(counts)}."]
    elif missing:
        sentences.insert(0, f"{missing:,} of {counts.scheduled:,} requests did not complete.")
        tone = "fair" if tone == "good" else tone
    return Verdict(headline=f"{name}: {headline}" if name else headline, sentences=sentences, tone=tone)


def cards_of(summary: Summary) -> Iterator[Card]:
    """Yield the figures that a reader looks for first; those that do not apply are left out."""
    overall = summary.overall
    if overall.slo:
        yield Card(
            label="SLO attainment",
            value=share(overall.slo.over_scheduled),
            detail=f"of all requests; {share(overall.slo.over_completed)} of those that completed",
        )
    if overall.goodput:
        yield Card(
            label="Goodput",
            value=share(overall.goodput.share),
            detail=f"{figure(overall.goodput.per_s)} requests/s within the SLOs on TTFT and TPOT",
        )
    yield figures_card("Latency, p95", overall.latency_s, "s")
    yield figures_card("TTFT, p95", overall.ttft_s, "s")
    yield figures_card("TPOT, p95", overall.tpot_s, "ms", factor=1e3)
    yield Card(
        label="Throughput", value=f"{figure(overall.throughput_per_s)} /s", detail="completed requests per second"
    )
    yield Card(label="GPU hours", value=figure(overall.operational_cost_gpu_hours), detail=_gpu_detail(summary))
    yield Card(label="Requests", value=f"{overall.counts.scheduled:,}", detail=counts_text(overall.counts))


def figures_card(label: str, figures: Figures | None, unit: str, *, factor: float = 1.0) -> Card:
    """Return the card of a duration: its p95, with the median and p99 below; `factor` is from seconds to the unit."""
    if figures is None:
        return Card(label=label, value=NONE, detail="no request has one")
    p50, p95, p99 = (figure(factor * value) for value in (figures.p50, figures.p95, figures.p99))
    return Card(label=label, value=f"{p95} {unit}", detail=f"median {p50} {unit}, p99 {p99} {unit}")


def _gpu_detail(summary: Summary) -> str:
    if summary.gpus is None:
        return "computing requests"
    return f"computing requests; {figure(summary.gpus.mean_gpus)} GPUs busy on average"


def counts_text(counts: Counts) -> str:
    """Return how requests ended, as a sum."""
    parts = {
        "completed": counts.completed,
        "refused": counts.refused,
        "failed": counts.failed,
        "unfinished": counts.unfinished,
    }
    return " + ".join(f"{count:,} {name}" for name, count in parts.items())


def deployments_table(deployments: Sequence[DeploymentRecord], *, policy: str = "") -> Table:
    """Return what was deployed where, and why so: the note of the choice, or the reason against it."""
    columns = [
        Column("#", align="right"),
        Column("model"),
        Column("configuration"),
        Column("layers", wrap="words"),
        Column("GPUs", wrap="words"),
        number_column("GiB"),
        number_column("estimated latency s"),
        Column("intent"),
        Column("status"),
        Column("reason", wrap="words"),
    ]
    rows = [_deployment_row(item, policy) for item in deployments]
    return Table("Deployments, with the reason for each choice", columns, rows)


def _deployment_row(deployment: DeploymentRecord, policy: str) -> Any:
    plan, endpoint = deployment.plan, deployment.endpoint
    latency_s = plan.est_latency_s or None if plan else None
    return row(
        str(deployment.deployment_id),
        endpoint.model.name,
        str(plan.configuration) if plan else NONE,
        layer_list(plan.layer_split) if plan else NONE,
        gpu_list(plan.gpu_ids) if plan else NONE,
        f"{gib(plan.memory_bytes):.1f}" if plan else NONE,
        figure(latency_s),
        endpoint.intent.objective.value,
        Text(deployment.status, STATUS_STYLES.get(deployment.status, "")),
        _reason(deployment, policy),
    )


def _reason(deployment: DeploymentRecord, policy: str) -> str:
    """Return why it is as it is: what was noted, and what configuration and GPUs were chosen by."""
    plan = deployment.plan
    if plan is None:
        return deployment.reason
    if policy.startswith("alpaserve"):
        chosen = f"placed by the search of {policy}"
    else:
        by_policy = f"GPUs by the policy {policy}" if policy else ""
        chosen = "; ".join(filter(None, (_choice(deployment), by_policy)))
    return "; ".join(filter(None, (deployment.reason, plan.note, chosen)))


def _choice(deployment: DeploymentRecord) -> str:
    """Return what the configuration of a deployment was chosen by."""
    intent = deployment.endpoint.intent
    if deployment.endpoint.configuration is not None:
        return "the configuration was given"
    limits = [
        f"latency below {figure(intent.slo_s)} s" if intent.slo_s else "",
        f"TTFT within {1e3 * intent.slo_ttft_s:g} ms" if intent.slo_ttft_s else "",
        f"TPOT within {1e3 * intent.slo_tpot_s:g} ms" if intent.slo_tpot_s else "",
        f"accuracy of at least {intent.min_accuracy:g} %" if intent.min_accuracy else "",
        "float16 weights" if intent.float16_only else "",
    ]
    named = ", ".join(filter(None, limits))
    return f"best for {intent.objective.value}" + (f" with {named}" if named else "")


def _reasons_table(run: RunResults) -> list[Table]:
    """Return why requests did not complete, the most frequent first; no table where all did."""
    table = run.record.requests
    counts: dict[str, int] = {}
    for number in table.reason[table.reason > 0].tolist():
        counts[table.reasons[number]] = counts.get(table.reasons[number], 0) + 1
    if not counts:
        return []
    rows = [row(reason, f"{count:,}") for reason, count in sorted(counts.items(), key=lambda item: -item[1])]
    return [Table("Why requests did not complete", [Column("reason", wrap="words"), number_column("requests")], rows)]


def policy_of(meta: Mapping[str, Any]) -> str:
    """Return the placement policy of a run, "" where it is unknown."""
    options = meta.get("options")
    return str(options.get("policy") or "") if isinstance(options, Mapping) else ""


def snippets_of(run: RunResults, *, label: str = "") -> Iterator[Snippet]:
    """Yield the resolved options of a run, as JSON for `maveriq.simulate(**options)`; nothing where none are known."""
    options = run.meta.get("options")
    if isinstance(options, Mapping) and options:
        text = json.dumps(options, indent=2, ensure_ascii=False, default=str)
        yield Snippet(title=f"Options of {label}, as resolved" if label else "Options as resolved", text=text)


def versions_of(meta: Mapping[str, Any]) -> str:
    """Return the versions that made a run, as its run.json names them."""
    versions = meta.get("versions")
    if isinstance(versions, Mapping):
        return ", ".join(f"{name} {version}" for name, version in versions.items())
    return ""
