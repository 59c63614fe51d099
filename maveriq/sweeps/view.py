"""What a sweep found, as tables: means over seeds, and how the values of the compared factor differ."""

from __future__ import annotations

import math
from collections.abc import Sequence

from maveriq.report.formatting import NONE, figure, share
from maveriq.report.results import WIDE
from maveriq.report.view import Column, Part, Table, Text, View, fit_width, number_column, row, spaced
from maveriq.sweeps.run import SweepResult
from maveriq.sweeps.spec import SEED
from maveriq.sweeps.tables import ALL, COMPARED, SECONDS

_MAX_ROWS = 40
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
    "latency_mean_s": "mean latency", "latency_p95_s": "p95 latency", "ttft_mean_s": "mean TTFT",
    "tpot_mean_s": "mean TPOT", "throughput_per_s": "throughput", "cost_gib_s_mean": "mean cost",
    "gpu_hours": "GPU hours", "slo_attainment": "SLO attainment", "goodput": "goodput",
}  # fmt: skip


def sweep_view(result: SweepResult, *, width: int = WIDE) -> View:
    """Return the means of every combination of factors, the comparison, and what failed.

    Args:
        result: of the sweep.
        width: in characters; tables that are wider are split.
    """
    parts: list[Part] = []
    if len(result.seeds):
        parts += fit_width(_means(result), width)
    if len(result.comparison):
        parts += fit_width(_comparison(result), width)
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
    rows = []
    for record in result.comparison.to_dict("records"):
        is_ratio = record["effect"] == SECONDS
        ends = [_effect(float(record[name]), is_ratio=is_ratio) for name in ("estimate", "low", "high")]
        p_value = float(record["p_value"])
        rows.append(
            row(
                str(record["value"]),
                _NAMES[str(record["figure"])],
                str(record["pairs"]),
                ends[0],
                NONE if math.isnan(float(record["low"])) else f"{ends[1]} to {ends[2]}",
                _certainty(p_value),
                starts_section=str(record["figure"]) == _first_figure(result, record["value"]),
            )
        )
    contrast = result.comparison.iloc[0]
    columns: Sequence[Column] = [
        Column(f"\n{contrast['factor']}"),
        Column("\nfigure"),
        number_column("\npairs"),
        number_column("\ndifference"),
        number_column("\n95 % interval"),
        Column("\np (Holm)"),
    ]
    return Table(f"Against {contrast['factor']} {contrast['baseline']}, in pairs of equal seeds", columns, rows)


def _first_figure(result: SweepResult, value: object) -> str:
    own = result.comparison[result.comparison["value"] == value]
    return next(name for name in COMPARED if name in set(own["figure"]))


def _effect(value: float, *, is_ratio: bool) -> str:
    return f"{100 * (value - 1):+.1f} %" if is_ratio else f"{100 * value:+.1f} pt"


def _certainty(p_value: float) -> str | Text:
    if math.isnan(p_value):
        return NONE
    text = "<0.001" if p_value < 0.001 else f"{p_value:.3f}"
    return Text(text, "bold") if p_value < _SIGNIFICANT else text
