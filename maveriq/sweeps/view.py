"""What a sweep found, as tables: means over seeds, and how the values of the compared factor differ."""

from __future__ import annotations

import math

from maveriq.report.formatting import NONE, figure, share
from maveriq.report.results import WIDE
from maveriq.report.view import Column, Part, Table, Text, View, fit_width, number_column, row, spaced
from maveriq.sweeps.answer import answer_sentence
from maveriq.sweeps.run import SweepResult
from maveriq.sweeps.spec import SECONDS, SEED
from maveriq.sweeps.tables import ALL

_MAX_ROWS = 40
_MAX_COMPARISONS = 60
_SIGNIFICANT = 0.05
_EQUAL = 1e-9  # a spread of rounding alone
_SHOWN = {
    "completed": "\ndone",
    "latency_mean_s": "latency\nmean s",
    "latency_p95_s": "\np95 s",
    "ttft_p95_s": "TTFT\np95 s",
    "tpot_mean_s": "TPOT\nmean ms",
    "throughput_per_s": "requests\nper s",
    "gpu_hours": "GPU\nhours",
    "slo_attainment": "SLO\nmet",
    "goodput": "\ngoodput",
}
_SHARES = ("slo_attainment", "goodput")
_FACTORS = {"tpot_mean_s": 1e3}
_NAMES = {
    "latency_mean_s": "mean latency", "latency_p95_s": "p95 latency", "throughput_per_s": "throughput",
    "gpu_hours": "GPU hours", "slo_attainment": "SLO attainment", "goodput": "goodput",
}  # fmt: skip
"""The figures that are shown of a comparison."""


def sweep_view(result: SweepResult, *, width: int = WIDE) -> View:
    """Return the means of every combination of factors, the comparison, the answer if one was asked for, and failures.

    Args:
        result: of the sweep.
        width: in characters; tables that are wider are split.
    """
    parts: list[Part] = []
    if len(result.seeds):
        parts += fit_width(_means(result), width)
    if len(result.comparison):
        parts += fit_width(_comparison(result), width)
    if answer := answer_sentence(result.spec, result.cells):
        parts.append(Text(" ".join(filter(None, [result.spec.question, answer])), "bold"))
    parts += [Text(f"run {cell.number} failed ({cell}): {reason}", "red") for cell, reason in result.failed]
    return View(spaced(parts))


def _means(result: SweepResult) -> Table:
    factors = [name for name in result.spec.factors() if name != SEED]
    whole = result.seeds[result.seeds["model"] == ALL]
    figures = [name for name in _SHOWN if name in whole and whole[name].notna().any()]
    records = whole.to_dict("records")
    rows = [
        row(
            ", ".join(str(record[name]) for name in factors) or result.spec.name,
            str(record["seeds"]),
            *(_mean(name, float(record[name]), float(record[f"{name}_ci95"])) for name in figures),
        )
        for record in records[:_MAX_ROWS]
    ]
    more = f", the first {_MAX_ROWS} of {len(records):,} (all are in seeds.csv)" if len(records) > _MAX_ROWS else ""
    columns = [
        Column(f"\n{', '.join(factors) or 'sweep'}"),
        number_column("\nseeds"),
        *(number_column(_SHOWN[name]) for name in figures),
    ]
    return Table(f"Means over seeds, ± 95 %{more}", columns, rows)


def _mean(name: str, mean: float, half_width: float) -> str:
    if math.isnan(mean):
        return NONE
    scale = 100.0 if name in _SHARES else _FACTORS.get(name, 1.0)
    text = share(mean) if name in _SHARES else figure(scale * mean)
    spreads = not math.isnan(half_width) and half_width > _EQUAL * abs(mean)
    return f"{text} ± {figure(scale * half_width)}" if spreads else text


def _comparison(result: SweepResult) -> Table:
    table = result.comparison[result.comparison["figure"].isin(_NAMES)]
    factor, baseline = table.iloc[0]["factor"], table.iloc[0]["baseline"]
    settings = [name for name in result.spec.factors() if name in table]
    rows = []
    for record in table.head(_MAX_COMPARISONS).to_dict("records"):
        is_ratio = record["effect"] == SECONDS
        ends = [_effect(float(record[name]), is_ratio=is_ratio) for name in ("estimate", "low", "high")]
        rows.append(
            row(
                ", ".join(str(record[name]) for name in ("value", *settings)),
                _NAMES[str(record["figure"])],
                str(record["pairs"]),
                ends[0],
                NONE if math.isnan(float(record["low"])) else f"{ends[1].split()[0]} to {ends[2].split()[0]}",
                _certainty(float(record["p_value"])),
                starts_section=str(record["figure"]) == next(iter(_NAMES)),
            )
        )
    headers = (", ".join([str(factor), *settings]), "figure")
    columns = [
        *map(Column, headers), *map(number_column, ("pairs", "difference", "95 % interval")), Column("p"),
    ]  # fmt: skip
    more = " (the rest is in comparison.csv)" if len(table) > _MAX_COMPARISONS else ""
    return Table(f"Against {factor} {baseline}, in pairs of equal seeds{more}", columns, rows)


def _effect(value: float, *, is_ratio: bool) -> str:
    return f"{100 * (value - 1):+.1f} %" if is_ratio else f"{100 * value:+.1f} pt"


def _certainty(p_value: float) -> str | Text:
    if math.isnan(p_value):
        return NONE
    text = "<0.001" if p_value < 0.001 else f"{p_value:.3f}"
    return Text(text, "bold") if p_value < _SIGNIFICANT else text
