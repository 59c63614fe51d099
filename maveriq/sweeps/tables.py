"""The tables of a sweep: a row for each cell and model, means over seeds, and values of a factor compared in pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maveriq.sweeps.spec import COMPARED, POINTS, SECONDS, SEED, Cell, Contrast
from maveriq.sweeps.worker import CellResult

if TYPE_CHECKING:
    import pandas as pd

ALL = "all"
"""In the column `model`: the whole run."""

CONFIDENCE = 0.95
_ROUNDING = 1e-12  # pairs that differ by less differ equally


def cells_table(cells: Sequence[Cell], results: Mapping[int, CellResult], factors: Sequence[str]) -> pd.DataFrame:
    """Return one row for each cell and model, and one for the whole run (`model` "all").

    Columns: `run` (number of the cell), the factors, `model`, `saturation` (of the run), `error` ("" if it was
    simulated; then it has no other row), the columns of `Run.metrics`, and `simulated_in_s`. A cell that has no result
    yet has no row.
    """
    import pandas as pd

    rows = []
    for cell in cells:
        result = results.get(cell.number)
        if result is None:
            continue
        for model, figures in (result.rows or {ALL: {}}).items():
            rows.append(
                {
                    "run": cell.number,
                    **{name: cell.factors.get(name) for name in factors},  # a listed run need not name all
                    "model": model,
                    "saturation": result.saturation,
                    "error": result.error,
                    **figures,
                    "simulated_in_s": result.seconds,
                }
            )
    return pd.DataFrame(rows)


def over_seeds(table: pd.DataFrame, factors: Sequence[str]) -> pd.DataFrame:
    """Return means over seeds with the half-width of their 95 % confidence interval (Student's t).

    One row for each combination of the other factors and model: `seeds`, and for each figure `NAME` and `NAME_ci95`
    (NaN for fewer than two seeds).
    """
    import pandas as pd

    if not len(table):
        return pd.DataFrame()
    groups = [name for name in factors if name != SEED] + ["model"]
    figures = _figures(table, factors)
    rows = []
    simulated = table[table["error"] == ""]
    all_values = simulated[figures].to_numpy(float)
    for key, places in simulated.groupby(groups, sort=False, dropna=False).indices.items():
        values_of_groups = key if isinstance(key, tuple) else (key,)  # pandas gives one group's value without a tuple
        row: dict[str, Any] = dict(zip(groups, values_of_groups, strict=True)) | {"seeds": len(places)}
        for name, column in zip(figures, all_values[places].T, strict=True):
            values = column[~np.isnan(column)]
            row[name] = values.mean() if len(values) else np.nan
            row[f"{name}_ci95"] = _half_width(values)
        rows.append(row)
    return pd.DataFrame(rows)


def _figures(table: pd.DataFrame, factors: Sequence[str]) -> list[str]:
    others = {"run", "model", "saturation", "error", "simulated_in_s", *factors}
    return [name for name in table.columns if name not in others]


def _half_width(values: np.ndarray[Any, Any]) -> float:
    """Return the half-width of the confidence interval of a mean, NaN for fewer than two values."""
    if len(values) < 2:
        return float("nan")
    from scipy import stats

    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return float(quantile * values.std(ddof=1) / np.sqrt(len(values)))


def compare_values(table: pd.DataFrame, factors: Sequence[str], contrast: Contrast) -> pd.DataFrame:
    """Return how the values of a factor differ from its baseline, in pairs that agree in all else.

    With several seeds, each combination of the other factors is compared by itself, in pairs of equal seeds: these draw
    equal arrivals and lengths, so a pair differs by the factor alone. Without, all combinations are the pairs of one
    comparison. Ratios are geometric means, and their intervals those of a paired t-test of logarithms; shares are
    compared by their difference. `p_value` is adjusted for the number of comparisons (Holm), so that one below 0.05 is
    a finding.

    Columns: the other factors (with several seeds), `factor`, `value`, `baseline`, `figure`, `pairs`, `effect` ("ratio"
    or "difference"), `estimate`, `low`, `high` (95 %), `p_value` (NaN for one pair, or where all pairs differ equally).
    """
    import pandas as pd

    whole = table[(table["model"] == ALL) & (table["error"] == "")] if len(table) else table
    values = list(dict.fromkeys(whole[contrast.factor])) if len(whole) else []
    baseline = contrast.baseline if contrast.baseline != "" else next(iter(values), "")
    others = [name for name in factors if name != contrast.factor]
    has_seeds = SEED in others and whole[SEED].nunique() > 1
    settings = [name for name in others if name != SEED] if has_seeds else []
    rows: list[dict[str, Any]] = []
    for value in (value for value in values if value != baseline):
        all_pairs = pairs_of(whole, others, contrast.factor, value, baseline)
        compared = {"factor": contrast.factor, "value": value, "baseline": baseline}
        for setting, pairs in _by_setting(all_pairs, settings):
            for figure, effect in COMPARED.items():
                if figure in whole and len(found := differences(pairs, figure, effect)):
                    counted = {"figure": figure, "pairs": len(found), "effect": effect}
                    rows.append(setting | compared | counted | _estimate(found, effect))
    for row, adjusted in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_value"] = adjusted
    return pd.DataFrame(rows)


def _by_setting(pairs: pd.DataFrame, settings: Sequence[str]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Yield the pairs of each combination of some factors, with their values."""
    if not settings:
        yield {}, pairs
        return
    for key, group in pairs.groupby(list(settings), sort=False, dropna=False):
        yield dict(zip(settings, key, strict=True)), group


def pairs_of(whole: pd.DataFrame, keys: Sequence[str], factor: str, value: object, baseline: object) -> pd.DataFrame:
    """Return the runs with a value of a factor beside those with its baseline that agree in `keys`.

    Columns of the baseline's run end in `_baseline`.
    """
    ours, theirs = (whole[whole[factor] == each] for each in (value, baseline))
    if not keys:
        return ours.merge(theirs, how="cross", suffixes=("", "_baseline"))
    return ours.merge(theirs, on=list(keys), suffixes=("", "_baseline"))


def differences(pairs: pd.DataFrame, figure: str, effect: str) -> np.ndarray[Any, Any]:
    """Return the difference within each pair that has the figure: of logarithms, or of shares."""
    ours, theirs = (pairs[name].to_numpy(float) for name in (figure, f"{figure}_baseline"))
    known = np.isfinite(ours) & np.isfinite(theirs)
    if effect == POINTS:
        return np.asarray(ours[known] - theirs[known])
    known &= (ours > 0) & (theirs > 0)
    return np.asarray(np.log(ours[known] / theirs[known]))


def _estimate(found: np.ndarray[Any, Any], effect: str) -> dict[str, float]:
    from scipy import stats

    mean, half = float(found.mean()), _half_width(found)
    spread = float(found.std(ddof=1)) if len(found) > 1 else 0.0
    differs = spread > _ROUNDING * max(1.0, abs(mean))
    p_value = float(stats.ttest_1samp(found, 0.0).pvalue) if differs else float("nan")
    ends = np.array([mean, mean - half, mean + half])
    estimate, low, high = (np.exp(ends) if effect == SECONDS else ends).tolist()
    return {"estimate": estimate, "low": low, "high": high, "p_value": p_value}


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple comparisons (Holm 1979); NaN stays, and counts for nothing."""
    known = sorted((p, position) for position, p in enumerate(p_values) if not np.isnan(p))
    adjusted, least = [float("nan")] * len(p_values), 0.0
    for rank, (p, position) in enumerate(known):
        least = max(least, min(1.0, p * (len(known) - rank)))
        adjusted[position] = least
    return adjusted


def write_tables(folder: Path, cells: pd.DataFrame, seeds: pd.DataFrame, comparison: pd.DataFrame) -> None:
    """Write cells.csv, cells.parquet, seeds.csv and, if anything is compared, comparison.csv; each whole or not."""
    _replace(folder / "cells.csv", lambda path: cells.to_csv(path, index=False))
    # A factor may have numbers and texts; a column of a Parquet file has one type.
    plain = cells.astype({name: "string" for name in cells.columns if cells[name].dtype == object})
    _replace(folder / "cells.parquet", lambda path: plain.to_parquet(path, index=False))
    _replace(folder / "seeds.csv", lambda path: seeds.to_csv(path, index=False))
    if len(comparison):
        _replace(folder / "comparison.csv", lambda path: comparison.to_csv(path, index=False))


def _replace(path: Path, write: Any) -> None:
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    partial.replace(path)
