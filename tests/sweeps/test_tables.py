"""Means over seeds and paired comparisons, against the formulas and against cases with a known answer."""

import math

import numpy as np
import pytest
from scipy import stats

from maveriq.sweeps.spec import Contrast, cells_of, read_sweep
from maveriq.sweeps.tables import ALL, cells_table, compare_values, holm, over_seeds
from maveriq.sweeps.worker import CellResult

FACTORS = ("policy", "scale", "seed")
SPEC = read_sweep({"grid": {"policy": ["a", "b"], "scale": [0.1, 0.2], "seed": [1, 2, 3, 4]}})


def table(latency_of, errors=()):
    cells = cells_of(SPEC)
    results = {
        cell.number: CellResult(number=cell.number, error="no", seconds=1.0)
        if cell.number in errors
        else CellResult(
            number=cell.number,
            saturation="stable",
            rows={name: {"latency_mean_s": latency_of(**cell.factors), "slo_attainment": 0.5} for name in (ALL, "m")},
        )
        for cell in cells
    }
    return cells_table(cells, results, FACTORS)


def noisy(policy, scale, seed):
    draw = np.random.default_rng(seed).normal()  # the seed's, whatever the policy
    return math.exp(scale + 0.5 * draw) * (1.1 if policy == "b" else 1.0)


def test_means_over_seeds_are_students():
    cells = table(noisy)
    seeds = over_seeds(cells, FACTORS)
    row = seeds[(seeds.policy == "a") & (seeds.scale == 0.2) & (seeds.model == ALL)].iloc[0]
    values = [noisy("a", 0.2, seed) for seed in (1, 2, 3, 4)]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert row.latency_mean_s == pytest.approx(np.mean(values))
    assert row.latency_mean_s_ci95 == pytest.approx((high - low) / 2)
    assert row.seeds == 4
    assert len(seeds) == 2 * 2 * 2


def test_a_sweep_of_seeds_alone_has_a_row_for_each_model():
    cells = table(noisy)
    alone = cells[(cells.policy == "a") & (cells.scale == 0.1)].drop(columns=["policy", "scale"])
    seeds = over_seeds(alone, ("seed",))
    assert seeds.model.tolist() == alone.model.unique().tolist()
    assert set(seeds.seeds) == {4}


def test_pairs_of_equal_seeds_take_the_draws_out():
    found = compare_values(table(noisy), FACTORS, Contrast(factor="policy"))
    latency = found[found.figure == "latency_mean_s"]
    assert latency.scale.tolist() == [0.1, 0.2]  # each load by itself
    assert set(latency.value + latency.baseline) == {"ba"}
    assert set(latency.pairs) == {4}
    for name in ("estimate", "low", "high"):
        assert latency[name].tolist() == pytest.approx([1.1, 1.1])
    shares = found[found.figure == "slo_attainment"].iloc[0]
    assert (shares.effect, shares.estimate) == ("difference", 0.0)


def test_the_p_value_is_that_of_a_paired_t_test():
    def latency_of(policy, scale, seed):
        return noisy("a", scale, seed) * (math.exp(0.1 * math.sin(7 * seed + scale)) if policy == "b" else 1.0)

    found = compare_values(table(latency_of), FACTORS, Contrast(factor="policy", baseline="b"))
    tests = [
        stats.ttest_rel(
            *([math.log(latency_of(policy, scale, seed)) for seed in (1, 2, 3, 4)] for policy in ("a", "b"))
        )
        for scale in (0.1, 0.2)
    ]
    assert found[found.figure == "latency_mean_s"].p_value.tolist() == pytest.approx(holm([t.pvalue for t in tests]))
    low, high = np.exp(tests[0].confidence_interval(0.95))
    assert found.iloc[0][["low", "high"]].tolist() == pytest.approx([low, high])


def test_a_failed_cell_leaves_its_pair_out():
    found = compare_values(table(noisy, errors=(1,)), FACTORS, Contrast(factor="policy"))
    assert set(found.pairs[found.scale == 0.1]) == {3}
    assert set(found.pairs[found.scale == 0.2]) == {4}
    assert over_seeds(table(noisy, errors=(1,)), FACTORS).seeds.min() == 3


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]), ([0.5, math.nan, 0.9], [1.0, math.nan, 1.0]), ([], [])],
)
def test_holm_adjusts_as_published(p_values, adjusted):
    assert holm(p_values) == pytest.approx(adjusted, nan_ok=True)


def test_without_seeds_all_combinations_are_the_pairs():
    spec = read_sweep({"grid": {"policy": ["a", "b"], "scale": [0.1, 0.2, 0.3]}})
    results = {
        cell.number: CellResult(number=cell.number, rows={ALL: {"gpu_hours": noisy(seed=cell.number, **cell.factors)}})
        for cell in cells_of(spec)
    }
    factors = spec.factors()
    found = compare_values(cells_table(cells_of(spec), results, factors), factors, Contrast(factor="policy"))
    assert found.pairs.tolist() == [3]
    assert "scale" not in found
