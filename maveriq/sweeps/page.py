"""The report of a sweep: which combination is best, how sure that is, and each figure over the factors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from maveriq.report.formatting import figure, share
from maveriq.report.page.charts import Axis, Bar, BarChart, Chart, Line, LineChart
from maveriq.report.page.page import Card, Page, Section, Snippet, Verdict
from maveriq.report.view import Column, Table, number_column, row
from maveriq.sweeps.run import SweepResult
from maveriq.sweeps.spec import SECONDS, SEED, cells_of
from maveriq.sweeps.tables import ALL
from maveriq.sweeps.view import sweep_view

if TYPE_CHECKING:
    import pandas as pd

_WIDE = 10**6  # characters: no table is split, the page scrolls
_MAX_LINES, _MAX_BARS, _MAX_FINDINGS = 12, 40, 8
_SIGNIFICANT = 0.05


class _Figure(NamedTuple):
    """A figure that has a chart: its column of `seeds.csv`, and how it is shown."""

    column: str
    title: str
    unit: str
    factor: float = 1.0
    more_is_better: bool = False


_SHARES = (
    _Figure("goodput", "Goodput", "% of requests", 100.0, more_is_better=True),
    _Figure("slo_attainment", "SLO attainment", "% of requests", 100.0, more_is_better=True),
)
_FIGURES = (
    *_SHARES,
    _Figure("latency_mean_s", "Mean latency", "s"),
    _Figure("latency_p95_s", "p95 latency", "s"),
    _Figure("ttft_p95_s", "p95 of TTFT", "s"),
    _Figure("tpot_mean_s", "Mean TPOT", "ms", 1e3),
    _Figure("throughput_per_s", "Throughput", "requests/s", more_is_better=True),
    _Figure("gpu_hours", "GPU hours", "h"),
)


def sweep_page(result: SweepResult, *, name: str) -> Page:
    """Return the report of a sweep.

    Args:
        result: what it found, see `maveriq.sweeps.run.load_sweep`.
        name: what it is called.
    """
    tables = [part for part in sweep_view(result, width=_WIDE).parts if isinstance(part, Table)]
    sections = [
        Section(
            section_id="figures",
            title="Figures over the factors",
            note="Means over seeds; areas and whiskers are 95 % intervals (Student's t)." if _seeds(result) > 1 else "",
            charts=list(_charts(result)),
        ),
        Section(section_id="tables", title="Means and comparisons", tables=tables),
        Section(section_id="failed", title="Runs that failed", tables=list(_failed(result))),
    ]
    return Page(
        title=f"maveriq report: {name}",
        subtitle=f"sweep · {result.spec.name}",
        kind="sweep",
        verdicts=[_verdict(result)],
        cards=list(_cards(result)),
        sections=[section for section in sections if section.charts or section.tables],
        snippets=[
            Snippet(
                title="The sweep",
                text=json.dumps(msgspec.to_builtins(result.spec), indent=2, ensure_ascii=False),
            )
        ],
    )


def _whole(result: SweepResult) -> pd.DataFrame:
    """Return the means over seeds of whole runs."""
    return result.seeds[result.seeds["model"] == ALL] if len(result.seeds) else result.seeds


def _factors(result: SweepResult) -> list[str]:
    return [name for name in result.spec.factors() if name != SEED]


def _seeds(result: SweepResult) -> int:
    whole = _whole(result)
    return int(whole["seeds"].max()) if len(whole) else 0


def _combination(record: dict[str, Any], factors: Sequence[str]) -> str:
    return ", ".join(f"{name} {record[name]}" for name in factors) or "the only combination"


def _known(whole: pd.DataFrame) -> Iterator[_Figure]:
    """Yield the figures that a run has."""
    for shown in _FIGURES:
        if len(whole) and shown.column in whole and whole[shown.column].notna().any():
            yield shown


def _verdict(result: SweepResult) -> Verdict:
    """Return the best combination by the figure that matters most, and the differences that are more than chance."""
    whole, factors = _whole(result), _factors(result)
    judged = next(_known(whole), None)
    if judged is None:
        return Verdict(headline="No run was simulated", sentences=[], tone="poor")
    records = whole[whole[judged.column].notna()].sort_values(judged.column, ascending=not judged.more_is_better)
    best = {str(key): value for key, value in records.iloc[0].to_dict().items()}
    end = "Highest" if judged.more_is_better else "Lowest"
    headline = f"{end} {judged.title.lower() if judged.title != 'SLO attainment' else judged.title}: "
    headline += f"{_combination(best, factors)} with {_shown(judged, float(best[judged.column]))}"
    sentences = [_certainty(judged, best, result)]
    equal = int((records[judged.column] == best[judged.column]).sum()) - 1
    if equal:
        sentences.append(f"{equal} other combination{'s equal' if equal > 1 else ' equals'} it.")
    findings = list(_findings(result))
    sentences += findings[:_MAX_FINDINGS]
    if len(findings) > _MAX_FINDINGS:
        sentences.append(f"{len(findings) - _MAX_FINDINGS} more differences are in the table of comparisons.")
    return Verdict(headline=headline, sentences=sentences, tone="neutral")


def _certainty(judged: _Figure, best: dict[str, Any], result: SweepResult) -> str:
    seeds = _seeds(result)
    half = float(best.get(f"{judged.column}_ci95", math.nan))
    if seeds < 2 or math.isnan(half):
        return "Each combination has one seed: differences may be chance."
    return f"± {figure(judged.factor * half)} {judged.unit.split(' ')[0]} (95 %, over {seeds} seeds)."


def _shown(judged: _Figure, value: float) -> str:
    return share(value) if judged in _SHARES else f"{figure(judged.factor * value)} {judged.unit}"


def _findings(result: SweepResult) -> Iterator[str]:
    """Yield the differences of the compared factor that are more than chance, a sentence each."""
    if not len(result.comparison):
        return
    titles = {shown.column: shown.title for shown in _FIGURES}
    table = result.comparison
    settings = [name for name in result.spec.factors() if name in table]
    for record in table[table["p_value"] < _SIGNIFICANT].to_dict("records"):
        if record["figure"] not in titles:
            continue
        is_ratio, estimate = record["effect"] == SECONDS, float(record["estimate"])
        effect = f"{100 * (estimate - 1):+.1f} %" if is_ratio else f"{100 * estimate:+.1f} pt"
        where = "".join(f", {name} {record[name]}" for name in settings)
        yield (
            f"{titles[str(record['figure'])]} of {record['factor']} {record['value']}{where}: {effect} against "
            f"{record['baseline']} (p {_p_value(float(record['p_value']))})."
        )


def _p_value(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"{value:.3f}"


def _cards(result: SweepResult) -> Iterator[Card]:
    failed = len(result.failed)
    done = result.cells["run"].nunique() - failed if len(result.cells) else 0
    yield Card(
        label="Runs", value=f"{done:,}", detail=f"simulated of {len(cells_of(result.spec)):,}; {failed:,} failed"
    )
    yield Card(
        label="Combinations",
        value=f"{len(_whole(result)):,}",
        detail=f"of {', '.join(_factors(result)) or 'no factor'}",
    )
    yield Card(label="Seeds", value=str(_seeds(result)), detail="of a combination, at most")
    if len(result.cells):
        runs = result.cells[(result.cells["model"] == ALL) & (result.cells["error"] == "")]
        counts = runs["saturation"].value_counts()
        detail = " + ".join(f"{int(count):,} {name}" for name, count in counts.items())
        stable = int(counts.get("stable", 0))
        yield Card(label="Stable runs", value=f"{stable:,}", detail=detail)


def _charts(result: SweepResult) -> Iterator[Chart]:
    whole, factors = _whole(result), _factors(result)
    axis = _axis_factor(whole, factors) if len(whole) else ""
    for shown in _known(whole):
        if axis:
            yield _lines(shown, whole, axis, [name for name in factors if name != axis])
        else:
            yield _bars(shown, whole, factors)


def _axis_factor(whole: pd.DataFrame, factors: Sequence[str]) -> str:
    """Return the number factor with most values, if the others have few combinations; else ""."""
    numeric = [
        name for name in factors if whole[name].nunique() > 1 and all(_is_number(value) for value in whole[name])
    ]
    for name in sorted(numeric, key=lambda name: -int(whole[name].nunique())):
        others = [other for other in factors if other != name]
        if not others or len(whole.drop_duplicates(others)) <= _MAX_LINES:
            return name
    return ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool | np.bool_)


def _table(shown: _Figure, whole: pd.DataFrame, factors: Sequence[str]) -> Table:
    rows = []
    for record in whole.head(_MAX_BARS).to_dict("records"):
        values = (_scaled(shown, record.get(name, math.nan)) for name in (shown.column, f"{shown.column}_ci95"))
        rows.append(row(*(str(record[name]) for name in factors), *map(figure, values)))
    more = f", the first {_MAX_BARS} of {len(whole):,}" if len(whole) > _MAX_BARS else ""
    headers = [number_column(f"mean, {shown.unit}"), number_column("± 95 %")]
    return Table(f"{shown.title}{more}", [*map(Column, factors), *headers], rows)


def _scaled(shown: _Figure, value: Any) -> float | None:
    return None if value is None or math.isnan(float(value)) else shown.factor * float(value)


def _lines(shown: _Figure, whole: pd.DataFrame, axis: str, others: Sequence[str]) -> LineChart:
    groups = whole.groupby(list(others), sort=False, dropna=False) if others else [((), whole)]
    lines = []
    for style, (key, group) in enumerate(groups, start=1):
        ordered = group.sort_values(axis)
        mean = shown.factor * ordered[shown.column].to_numpy(float)
        half = shown.factor * np.nan_to_num(ordered[f"{shown.column}_ci95"].to_numpy(float))
        lines.append(
            Line(
                name=", ".join(map(str, key)) if others else shown.title,
                x=ordered[axis].to_numpy(float),
                y=mean,
                low=np.maximum(mean - half, 0),
                high=np.minimum(mean + half, 100) if shown in _SHARES else mean + half,
                style=style,
                has_markers=True,
            )
        )
    named = f", a line for each {', '.join(others)}" if others else ""
    return LineChart(
        chart_id=shown.column.replace("_", "-"),
        title=shown.title,
        summary=f"{shown.title}, {shown.unit}, over {axis}{named}. "
        f"{'More' if shown.more_is_better else 'Less'} is better.",
        table=_table(shown, whole, [axis, *others]),
        x=Axis(label=axis),
        y=Axis(label=f"{shown.title}, {shown.unit}", low=0, high=100 if shown in _SHARES else None),
        lines=lines,
    )


def _bars(shown: _Figure, whole: pd.DataFrame, factors: Sequence[str]) -> BarChart:
    bars = []
    for at, record in enumerate(whole.head(_MAX_BARS).to_dict("records")):
        value, half = _scaled(shown, record[shown.column]), _scaled(shown, record.get(f"{shown.column}_ci95", math.nan))
        if value is not None:
            low, high = (None, None) if half is None else (max(value - half, 0), value + half)
            name = ", ".join(str(record[factor]) for factor in factors) or shown.title
            bars.append(Bar(name=name, value=value, style=at % 6 + 1, low=low, high=high))
    more = f" The first {_MAX_BARS} of {len(whole):,} combinations." if len(whole) > _MAX_BARS else ""
    return BarChart(
        chart_id=shown.column.replace("_", "-"),
        title=shown.title,
        summary=f"{shown.title}, {shown.unit}, by {', '.join(factors) or 'sweep'}. "
        f"{'More' if shown.more_is_better else 'Less'} is better.{more}",
        table=_table(shown, whole, factors),
        x=Axis(label=f"{shown.title}, {shown.unit}", low=0, high=100 if shown in _SHARES else None),
        bars=bars,
    )


def _failed(result: SweepResult) -> Iterator[Table]:
    if result.failed:
        columns = [Column("run"), Column("factors", wrap="words"), Column("reason", wrap="words")]
        rows = [row(str(cell.number), str(cell), reason) for cell, reason in result.failed]
        yield Table("Runs that failed", columns, rows)
