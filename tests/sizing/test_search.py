"""The search for the fewest GPUs: equal to an exhaustive one, with a tenth of its simulations, and honest intervals."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from maveriq.sizing.search import Verdict, fewest_gpus


class Cluster:
    """A made-up cluster whose attainment rises with its size, with noise of each seed; counts simulations."""

    def __init__(self, needed, *, steep=0.3, noise=0.0, salt=0):
        self._needed, self._steep, self._noise, self._salt = needed, steep, noise, salt
        self.simulations = 0

    def true(self, gpus):
        return 0.99 + 0.01 * np.tanh(self._steep * (gpus - self._needed + 0.5))

    def __call__(self, gpus, seeds):
        self.simulations += len(seeds)
        noise = [np.random.default_rng([self._salt, gpus, seed]).normal(scale=self._noise) for seed in seeds]
        return [float(np.clip(self.true(gpus) + each, 0, 1)) for each in noise]


@settings(max_examples=25)
@given(needed=st.integers(1, 500), first=st.integers(1, 600), extra=st.integers(0, 600))
def test_without_noise_the_answer_is_exact(needed, first, extra):
    cluster = Cluster(needed)
    found = fewest_gpus(cluster, target=0.99, max_gpus=needed + extra, first=first)
    assert (found.answer, found.low, found.high) == (needed, needed, needed)
    assert found.simulations == cluster.simulations


@settings(max_examples=25)
@given(needed=st.integers(2, 500))
def test_too_few_gpus_have_no_answer(needed):
    found = fewest_gpus(Cluster(needed), target=0.99, max_gpus=needed - 1)
    assert found.answer is None
    assert found.high is None
    assert found.low == needed


@pytest.mark.parametrize("needed", [3, 17, 40, 61])
def test_it_takes_a_tenth_of_the_simulations_of_an_exhaustive_search(needed):
    cluster = Cluster(needed, steep=1.0, noise=0.0005)
    found = fewest_gpus(cluster, target=0.99, max_gpus=64)
    assert found.answer == needed
    assert cluster.simulations <= 64 * 12 / 10


def test_the_interval_holds_the_truth_as_often_as_it_says():
    held = [
        (found := fewest_gpus(Cluster(20, steep=0.2, noise=0.004, salt=salt), target=0.99, max_gpus=64)).low
        <= 20
        <= (found.high or 64)
        for salt in range(100)
    ]
    assert np.mean(held) >= 0.9  # each end is that of one size, and several sizes are tried


@settings(max_examples=25)
@given(needed=st.integers(2, 40), lucky=st.integers(1, 40), first=st.integers(1, 64))
def test_a_smaller_size_that_meets_the_target_is_found_below_ones_that_miss_it(needed, lucky, first):
    """A policy can leave too few GPUs for the last model on 4 and enough on 3."""

    def simulate(gpus, seeds):
        return [0.999 if gpus >= needed or gpus == lucky else 0.7] * len(seeds)

    found = fewest_gpus(simulate, target=0.99, max_gpus=64, first=min(first, needed))
    assert found.answer == (lucky if needed - 24 <= lucky < needed else found.answer)
    assert found.answer in (lucky, needed)
    assert found.low <= found.answer


def test_one_size_that_meets_the_target_is_found_among_ones_that_miss_it():
    found = fewest_gpus(lambda gpus, seeds: [1.0 if gpus == 11 else 0.9] * len(seeds), target=0.99, max_gpus=16)
    assert (found.answer, found.low, found.high) == (11, 11, 11)


def test_an_answer_that_more_seeds_refute_is_given_up():
    """Three seeds are sure that four GPUs are enough, and six know better."""

    def simulate(gpus, seeds):
        return [1.0 if gpus >= 5 or (gpus == 4 and seed <= 3) else 0.5 for seed in seeds]

    assert fewest_gpus(simulate, target=0.9, max_gpus=64).answer == 5


def test_sizes_near_the_target_get_more_seeds_than_others():
    found = fewest_gpus(Cluster(20, steep=0.2, noise=0.004), target=0.99, max_gpus=64)
    seeds = {point.gpus: len(point.attainments) for point in found.points}
    assert seeds[found.answer] > seeds[1]
    assert {point.gpus for point in found.points if not point.verdict.is_sure} >= {found.answer}


def test_verdicts_follow_the_interval():
    sure = fewest_gpus(lambda _gpus, seeds: [1.0] * len(seeds), target=0.99, max_gpus=4)
    assert sure.points[0].verdict is Verdict.MEETS
    assert sure.points[0].half_width == 0
