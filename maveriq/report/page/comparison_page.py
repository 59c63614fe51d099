"""The report of several runs: each against the last one, which they are measured by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from maveriq.errors import MaveriqError
from maveriq.report.compare import Comparison, compare
from maveriq.report.compare_many import compare_many, many_view
from maveriq.report.compare_view import comparison_view, matching_line
from maveriq.report.formatting import NONE, figure, share, signed
from maveriq.report.page.charts import TIME_LABEL, Axis, Bar, BarChart, Chart, Line, LineChart
from maveriq.report.page.page import Card, Page, Section, Verdict
from maveriq.report.page.render import write_page
from maveriq.report.page.run_charts import (
    LATENCY,
    TPOT,
    TTFT,
    Distribution,
    distribution_chart,
    durations_us,
    intervals_s,
)
from maveriq.report.page.run_page import ReportableRun, RunResults, cards_of, snippets_of, verdict_of, versions_of
from maveriq.report.page.sampling import PARTS, level_over_time
from maveriq.report.run_labels import RunLabel, short_labels
from maveriq.report.view import Column, Part, Table, number_column, row
from maveriq.units import MICROS_PER_SECOND

_WIDE = 10**6  # characters: no table is split, the page scrolls
_TABLE_PARTS = 20
_MAX_JOINED = 3  # runs whose figures stand side by side on a card
_SHOWN = {"mean": "mean latency", "p95": "p95 latency", "slo": "SLO attainment", "throughput": "throughput"}
_UNITS = {"slo": "pt"}


def comparison_page(runs: Sequence[RunResults]) -> Page:
    """Return the report of at least two runs; the last is the one that the others are measured by.

    Raises:
        InvariantError: a request has no final status.
    """
    labels = [RunLabel(name=run.name, kind=run.kind) for run in runs]
    names = short_labels(labels)
    styles = {name: number for number, name in enumerate(names, start=1)}
    *others, reference = runs
    comparisons = [
        compare(run.record, reference.record, labels=(label, labels[-1]))
        for run, label in zip(others, labels[:-1], strict=True)
    ]
    named = dict(zip(names, runs, strict=True))
    sections = [
        Section(
            section_id="figures",
            title="Figures and differences",
            charts=list(_share_charts(named, styles)),
            tables=_tables(runs, labels, comparisons),
        ),
        Section(section_id="latency", title="Latency", charts=list(_distribution_charts(named, styles))),
        Section(section_id="load", title="Requests over time", charts=[_waiting_chart(named, styles)]),
    ]
    return Page(
        title=f"maveriq report: {' against '.join(names) if len(names) == 2 else f'{len(names)} runs'}",
        subtitle=f"{', '.join(map(str, labels[:-1]))} against {labels[-1]}",
        kind="comparison",
        verdicts=[
            *(_difference(found, (name, names[-1])) for found, name in zip(comparisons, names, strict=False)),
            *(verdict_of(run, name) for name, run in named.items()),
        ],
        cards=list(_cards(named)),
        sections=sections,
        notes=[f"{name}: {note}" for name, run in named.items() for note in run.meta.get("notes", ())],
        snippets=[snippet for name, run in named.items() for snippet in snippets_of(run, label=name)],
        written_by=versions_of(reference.meta),
    )


def write_comparison(
    runs: Sequence[ReportableRun], labels: Sequence[RunLabel], path: str | Path, *, overwrite: bool
) -> Path:
    """Write the report of runs that were compared, under the names in their labels, and return where it is.

    Raises:
        InputError: the file is there already and may not be replaced, or cannot be written.
        MaveriqError: there are only records, without what led to them; Bokeh or Jinja2 is not installed; the disk is
            full.
    """
    if not runs:
        raise MaveriqError("only records were compared; maveriq.compare of runs or folders gives a report")
    results = [run.results(label.name) for run, label in zip(runs, labels, strict=True)]
    return write_page(comparison_page(results), path, overwrite=overwrite)


def _difference(comparison: Comparison, names: tuple[str, str]) -> Verdict:
    """Return how a run differs from the reference, in a line."""
    differences = comparison.overall.differences
    found = [
        f"{title} {signed(differences[name].error, _UNITS.get(name, '%'))}"
        for name, title in _SHOWN.items()
        if name in differences and differences[name].error is not None
    ]
    return Verdict(
        headline=f"{names[0]} against {names[1]}: {', '.join(found) or 'no figure that both have'}",
        sentences=[matching_line(comparison)],
        tone="neutral",
    )


def _tables(runs: Sequence[RunResults], labels: Sequence[RunLabel], comparisons: Sequence[Comparison]) -> list[Table]:
    if len(runs) == 2:
        parts: Sequence[Part] = comparison_view(comparisons[0], width=_WIDE).parts
    else:
        parts = many_view(compare_many([run.record for run in runs], labels), width=_WIDE).parts
    return [part for part in parts if isinstance(part, Table)]


def _cards(named: Mapping[str, RunResults]) -> Iterator[Card]:
    """Yield a card for each figure that a run has, with its values in all runs."""
    found: dict[str, dict[str, str]] = {}
    for name, run in named.items():
        for card in cards_of(run.summary):
            found.setdefault(card.label, {})[name] = card.detail if card.label == "Requests" else card.value
    reference = list(named)[-1]
    for label, values in found.items():
        several = "; ".join(f"{name}: {value}" for name, value in values.items())
        if label == "Requests":
            counts = sorted({run.summary.overall.counts.scheduled for run in named.values()})
            value = f"{counts[0]:,} each" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
            yield Card(label=label, value=value, detail=several)
        elif len(values) <= _MAX_JOINED:
            yield Card(label=label, value=" / ".join(values.values()), detail=" / ".join(values))
        else:
            yield Card(label=f"{label}: {reference}", value=values.get(reference, NONE), detail=several)


def _distribution_charts(named: Mapping[str, RunResults], styles: Mapping[str, int]) -> Iterator[Chart]:
    for quantity in (LATENCY, TTFT, TPOT):
        parts = []
        for name, run in named.items():
            values = durations_us(run.record.requests, quantity)
            parts.append(Distribution(name, values[np.isfinite(values)], quantity.figures_of(run.summary.overall)))
        yield from distribution_chart(quantity, parts, styles, by_model=False)


def _waiting_chart(named: Mapping[str, RunResults], styles: Mapping[str, int]) -> LineChart:
    until_s = max(1, *(run.record.ended_us for run in named.values())) / MICROS_PER_SECOND
    lines, columns, peaks = [], [], []
    for name, run in named.items():
        edges, _, high = level_over_time(*intervals_s(run.record)["waiting"], until_s)
        lines.append(Line(name=name, x=edges, y=high, style=styles[name], is_step=True))
        columns.append(np.maximum.reduceat(high[:-1], np.arange(0, PARTS, PARTS // _TABLE_PARTS)))
        peaks.append(f"at most {int(high.max()):,} in {name}")
    times = np.linspace(0, until_s, _TABLE_PARTS + 1)[:-1]
    rows = [row(figure(float(time)), *(f"{int(column[at]):,}" for column in columns)) for at, time in enumerate(times)]
    columns_of_table = [number_column(header) for header in ("from, s", *named)]
    return LineChart(
        chart_id="requests",
        title="Requests waiting",
        summary=f"The most that waited in each {100 / PARTS:g} % of the time: {', '.join(peaks)}.",
        table=Table("Most requests waiting, in twentieths of the time", columns_of_table, rows),
        x=Axis(label=TIME_LABEL),
        y=Axis(label="requests waiting", low=0),
        lines=lines,
        is_over_time=True,
    )


def _share_charts(named: Mapping[str, RunResults], styles: Mapping[str, int]) -> Iterator[BarChart]:
    attained, good = {}, {}
    for name, run in named.items():
        overall = run.summary.overall
        if overall.slo:
            attained[name] = overall.slo.over_scheduled
        if overall.goodput:
            good[name] = overall.goodput.share
    for chart_id, title, values in (("slo", "SLO attainment", attained), ("goodput", "Goodput", good)):
        if not values:
            continue
        yield BarChart(
            chart_id=chart_id,
            title=f"{title} by run",
            summary="Share of all requests; what did not complete has missed.",
            table=Table(
                f"{title} by run",
                [Column("run"), number_column(title)],
                [row(name, share(value)) for name, value in values.items()],
            ),
            x=Axis(label=f"{title}, % of requests", low=0, high=100),
            bars=[Bar(name=name, value=100 * value, style=styles[name]) for name, value in values.items()],
        )
