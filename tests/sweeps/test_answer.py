"""The answer of a sweep: the best value, by how much, and only as sure as the seeds allow."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from maveriq.errors import InputError
from maveriq.sweeps.answer import answer_sentence, effects
from maveriq.sweeps.spec import read_sweep

QUEUES, SCALES, SEEDS = ["fifo", "sjf", "edf"], [0.2, 0.4], [1, 2, 3, 4, 5, 6]


def spec(figure="latency_mean_s"):
    return read_sweep(
        {
            "question": "Which queue is best?",
            "grid": {"queue": QUEUES, "scale": SCALES, "seed": SEEDS},
            "compare": {"factor": "queue", "baseline": "fifo"},
            "answer": {"figure": figure},
        }
    )


def cells(value_of):
    rows = [
        {"queue": queue, "scale": scale, "seed": seed, "model": "all", "error": "", **value_of(queue, scale, seed)}
        for queue in QUEUES
        for scale in SCALES
        for seed in SEEDS
    ]
    return pd.DataFrame(rows)


def latency(factor_of):
    return lambda queue, scale, seed: {"latency_mean_s": scale * seed * factor_of(queue, seed)}


def test_the_best_value_is_named_with_its_interval():
    table = cells(latency(lambda queue, seed: {"fifo": 1.0, "sjf": 0.8 + seed / 1e3, "edf": 0.95}[queue]))
    sentence = answer_sentence(spec(), table)
    assert sentence.startswith(
        "queue sjf is best: its mean latency differs from that of fifo by -19.7 % (-19.9 to -19.4"
    )


def test_a_baseline_that_is_best_is_named():
    table = cells(latency(lambda queue, _: {"fifo": 1.0, "sjf": 1.3, "edf": 1.1}[queue]))
    assert answer_sentence(spec(), table).startswith("queue fifo is best: the next one, edf, has a mean latency that")


def test_chance_is_no_answer():
    noise = np.random.default_rng(1).normal(1, 0.05, (3, 7))
    table = cells(latency(lambda queue, seed: float(noise[QUEUES.index(queue), seed])))
    assert answer_sentence(spec(), table).startswith("No queue is sure to differ from fifo in mean latency")


def test_intervals_are_those_of_the_mean_over_settings_for_all_values_together():
    draws = np.random.default_rng(2).normal(0.9, 0.02, (3, 2, 7))
    table = cells(lambda queue, scale, seed: {"goodput": float(draws[QUEUES.index(queue), SCALES.index(scale), seed])})
    found = effects(table, spec("goodput").factors(), spec("goodput").contrast(), "goodput")
    for place, effect in enumerate(found, start=1):
        of_seeds = 100 * (draws[place] - draws[0]).mean(axis=0)[1:]
        low, high = stats.ttest_1samp(of_seeds, 0.0).confidence_interval(1 - 0.05 / 2)
        assert (effect.estimate, effect.low, effect.high) == pytest.approx((of_seeds.mean(), low, high))


def test_an_answer_needs_a_comparison_and_a_known_figure():
    with pytest.raises(InputError, match="nothing is compared"):
        read_sweep({"grid": {"seed": [1, 2]}, "answer": {"figure": "goodput"}})
    with pytest.raises(InputError, match="figure of the answer"):
        spec("speed")


def test_a_sweep_that_asks_nothing_answers_nothing():
    assert answer_sentence(read_sweep({"grid": {"seed": [1, 2]}}), pd.DataFrame()) == ""
