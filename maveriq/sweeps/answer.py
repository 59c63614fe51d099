"""The answer to the question of a sweep: which value of the compared factor is best, by how much, and how sure that is.

Each seed gives one difference from the baseline: the mean over all else that varies. Seeds draw equal arrivals and
lengths for all values, so their differences are independent. Intervals and p-values count that several values are
compared at once (Bonferroni): all intervals of an answer hold together in 95 of 100 cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from maveriq.sweeps.spec import COMPARED, POINTS, SEED, Contrast, SweepSpec, Value
from maveriq.sweeps.tables import ALL, CONFIDENCE, differences, pairs_of

if TYPE_CHECKING:
    import pandas as pd

_NAMES = {
    "latency_mean_s": "mean latency", "latency_p95_s": "p95 latency", "ttft_mean_s": "mean TTFT",
    "tpot_mean_s": "mean TPOT", "throughput_per_s": "throughput", "cost_gib_s_mean": "mean cost",
    "gpu_hours": "GPU hours", "slo_attainment": "SLO attainment", "goodput": "goodput",
}  # fmt: skip
_MORE_IS_BETTER = ("throughput_per_s", "slo_attainment", "goodput")


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """How a value of a factor differs from the baseline: in percent, or of a share in percentage points.

    Args:
        value: of the factor.
        estimate: the difference; positive where the figure is larger.
        low: the lower end of its interval.
        high: the upper end.
        seeds: differences that it is the mean of.
    """

    value: Value
    estimate: float
    low: float
    high: float
    seeds: int

    @property
    def is_sure(self) -> bool:
        """Whether the interval excludes that there is no difference."""
        return self.low > 0 or self.high < 0


def effects(cells: pd.DataFrame, factors: Sequence[str], contrast: Contrast, figure: str) -> list[Effect]:
    """Return the effect of each value that has a pair with the baseline, in the order of the sweep.

    Args:
        cells: see `maveriq.sweeps.tables.cells_table`.
        factors: of the sweep.
        contrast: what is compared.
        figure: a column, one of `COMPARED`.
    """
    whole = cells[(cells["model"] == ALL) & (cells["error"] == "")] if len(cells) else cells
    if not len(whole) or figure not in whole:
        return []
    values = list(dict.fromkeys(whole[contrast.factor]))
    baseline = contrast.baseline if contrast.baseline != "" else values[0]
    others = [name for name in factors if name != contrast.factor]
    found = []
    for value in (value for value in values if value != baseline):
        pairs = pairs_of(whole, others, contrast.factor, value, baseline)
        groups = (
            [group for _, group in pairs.groupby(SEED)]
            if SEED in others
            else [pairs.iloc[[n]] for n in range(len(pairs))]
        )
        of_seeds = [each.mean() for group in groups if len(each := differences(group, figure, COMPARED[figure]))]
        if of_seeds:
            found.append(_effect(value, np.array(of_seeds), COMPARED[figure], comparisons=len(values) - 1))
    return found


def _effect(
    value: Value, of_seeds: np.ndarray[tuple[int], np.dtype[np.float64]], kind: str, *, comparisons: int
) -> Effect:
    from scipy import stats

    mean, count = float(of_seeds.mean()), len(of_seeds)
    half = np.inf
    if count > 1:
        quantile = stats.t.ppf(1 - (1 - CONFIDENCE) / 2 / comparisons, count - 1)
        half = float(quantile * of_seeds.std(ddof=1) / np.sqrt(count))
    ends = np.array([mean, mean - half, mean + half])
    estimate, low, high = (100 * (ends if kind == POINTS else np.expm1(ends))).tolist()
    return Effect(value=value, estimate=estimate, low=low, high=high, seeds=count)


def answer_sentence(spec: SweepSpec, cells: pd.DataFrame) -> str:
    """Return the answer in one sentence; "" for a sweep that asks nothing, or has no pair yet."""
    contrast = spec.contrast()
    if spec.answer is None or contrast is None:
        return ""
    figure = spec.answer.figure
    found = effects(cells, spec.factors(), contrast, figure)
    if not found:
        return ""
    sign = 1 if figure in _MORE_IS_BETTER else -1
    best = max(found, key=lambda effect: sign * effect.estimate)
    baseline = contrast.baseline if contrast.baseline != "" else cells[contrast.factor].iloc[0]
    unit = "points" if COMPARED[figure] == POINTS else "%"
    name, factor = _NAMES[figure], contrast.factor
    between = f"{best.estimate:+.1f} {unit} ({best.low:+.1f} to {best.high:+.1f}; 95 %, {best.seeds} seeds)"
    if not best.is_sure:
        return f"No {factor} is sure to differ from {baseline} in {name}: the best one, {best.value}, by {between}."
    if sign * best.estimate < 0:
        return f"{factor} {baseline} is best: the next one, {best.value}, has a {name} that differs by {between}."
    return f"{factor} {best.value} is best: its {name} differs from that of {baseline} by {between}."
