"""What a sweep varies: cells of grids and samples, and one clear line for each mistake."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from maveriq.errors import InputError
from maveriq.sweeps.spec import cells_of, read_sweep


def test_the_grid_is_every_combination_and_its_last_factor_changes_fastest():
    spec = read_sweep({"options": {"limit": 5}, "grid": {"policy": ["llf", "packing"], "seed": [1, 2, 3]}})
    cells = cells_of(spec)
    assert [(cell.number, *cell.factors.values()) for cell in cells] == [
        (1, "llf", 1), (2, "llf", 2), (3, "llf", 3), (4, "packing", 1), (5, "packing", 2), (6, "packing", 3),
    ]  # fmt: skip
    assert cells[4].options == {"limit": 5, "policy": "packing", "seed": 2}


def test_grid_and_sample_are_crossed():
    of = {"scale": {"low": 0.1, "high": 0.4}}
    spec = read_sweep({"grid": {"seed": [1, 2]}, "sample": {"count": 3, "of": of}})
    cells = cells_of(spec)
    assert len(cells) == 6
    assert [cell.factors["scale"] for cell in cells[:3]] == [cell.factors["scale"] for cell in cells[3:]]


def test_listed_runs_are_crossed_with_the_grid_and_need_not_name_the_same_options():
    spec = read_sweep({"grid": {"seed": [1, 2]}, "runs": [{"policy": "llf"}, {"policy": "none", "intent": "min-cost"}]})
    assert spec.factors() == ("seed", "policy", "intent")
    assert [cell.factors for cell in cells_of(spec)] == [
        {"seed": 1, "policy": "llf"}, {"seed": 1, "policy": "none", "intent": "min-cost"},
        {"seed": 2, "policy": "llf"}, {"seed": 2, "policy": "none", "intent": "min-cost"},
    ]  # fmt: skip


@given(
    count=st.integers(1, 40),
    low=st.floats(0.01, 10),
    ratio=st.floats(1.01, 100),
    log=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_latin_hypercube_has_one_point_in_each_stratum(count, low, ratio, log, seed):
    high = low * ratio
    of = {"scale": {"low": low, "high": high, "log": log}}
    sample = read_sweep({"sample": {"count": count, "seed": seed, "of": of}}).sample
    values = np.array([point["scale"] for point in sample.points()])
    place = np.log(values / low) / math.log(ratio) if log else (values - low) / (high - low)
    assert sorted(np.floor(place * count + 1e-6).clip(0, count - 1)) == list(range(count))


def test_whole_ranges_give_whole_numbers_up_to_the_last():
    sample = read_sweep({"sample": {"count": 300, "method": "random", "of": {"seed": {"low": 1, "high": 3}}}}).sample
    drawn = [point["seed"] for point in sample.points()]
    assert set(drawn) == {1, 2, 3}
    assert all(type(value) is int for value in drawn)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"grid": {"polcy": ["llf"]}}, "unknown option 'polcy'; did you mean 'policy'?"),
        ({"grid": {"slo-scale": [1]}}, "slo-scale is spelled slo_scale here"),
        ({"grid": {"seed": [1, 1]}}, "grid: seed has a value twice"),
        ({"grid": {"seed": []}}, "must be a list of length at least 1"),
        ({"grid": {"seed": [1]}, "options": {"seed": 2}}, "seed is given twice"),
        ({"sample": {"count": 2, "of": {}}}, "sample: of names no factor"),
        ({"sample": {"count": 2, "of": {"scale": {"low": 3, "high": 2}}}}, "sample: scale needs a low below its high"),
        ({"sample": {"count": 2, "of": {"scale": {"low": 0, "high": 2, "log": True}}}}, "needs a low above 0"),
        ({"sample": {"count": 2, "of": {"scale": {"low": 1}}}}, "sample: scale needs low and high, or values"),
        ({"grid": {"seed": [1]}, "compare": {"factor": "policy"}}, "unknown factor to compare 'policy'"),
        ({"grid": {"seed": [1]}, "compare": {"factor": "seed", "baseline": 3}}, "baseline 3 is not a value of seed"),
        ({"grid": {"seed": list(range(400)), "limit": list(range(1, 400))}}, "these are 159,600 runs"),
        ({"gird": {"seed": [1]}}, "gird"),
    ],
)
def test_mistakes_are_named(changes, says):
    with pytest.raises(InputError) as refused:
        read_sweep(changes)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_impossible_value_names_its_run():
    with pytest.raises(InputError, match=r"run 2 \(batch_size 0\): --batch-size must be at least 1"):
        cells_of(read_sweep({"grid": {"batch_size": [5, 0]}}))
