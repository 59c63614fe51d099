"""Arrival draws: the published draw against a simple loop, Poisson against its statistics."""

import numpy as np
import pytest

from maveriq.errors import InputError
from maveriq.workload.arrivals import deploy_times, published_draw, staged_poisson, steady_poisson


def published_one_by_one(counts, scale, load_at, seed):
    """The published loop: one choice for each request."""
    legacy = np.random.RandomState(seed)
    requests, deployed = [], 0
    for index, count in enumerate(counts):
        deployed += load_at.count(index)
        times = np.sort(legacy.uniform(30 * index, 30 * index + 29.9, int(count * scale)))
        requests += [(time + 90 * deployed, legacy.choice(np.arange(1, deployed + 1))) for time in times]
    return requests


@pytest.mark.parametrize("seed", [0, 42])
@pytest.mark.parametrize("load_at", [(0,), (0, 0, 2), (0, 1, 2, 3, 4)])
def test_the_vectorized_draw_equals_the_published_loop(load_at, seed):
    counts = np.array([7, 0, 33, 1, 100])
    draw = published_draw(counts, scale=0.7, load_at=load_at, seed=seed)
    expected = published_one_by_one(counts.tolist(), 0.7, load_at, seed)
    assert draw.arrival_us.tolist() == [round(time * 1e6) for time, _ in expected]
    assert draw.endpoint_id.tolist() == [endpoint for _, endpoint in expected]
    assert draw.bin_index.tolist() == [0] * 4 + [2] * 23 + [4] * 70


def test_deploy_times_follow_bins_and_earlier_models():
    assert deploy_times((0, 0, 3, 5)) == [0, 90_000_000, 300_000_000, 450_000_000]


def test_stages_alternate_between_two_rates():
    draw = staged_poisson(scale=20.0, load_at=(0,), seed=1)
    stage_of = (draw.arrival_us - 90_000_000) // 120_000_000
    rates_per_s = np.bincount(stage_of, minlength=15) / 120
    assert rates_per_s[::2] == pytest.approx(100, rel=0.05)
    assert rates_per_s[1::2] == pytest.approx(250, rel=0.05)


def test_steady_poisson_has_exponential_gaps_and_even_endpoints():
    arrivals = steady_poisson(rate_per_s=50.0, requests=200_000, endpoints=4, seed=3)
    gaps_s = np.diff(arrivals.arrival_us) / 1e6
    assert gaps_s.mean() == pytest.approx(0.02, rel=0.01)
    assert gaps_s.std() == pytest.approx(0.02, rel=0.01)
    assert np.bincount(arrivals.endpoint_id)[1:] / 200_000 == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize(
    "wrong",
    [{"rate_per_s": 0.0}, {"rate_per_s": float("inf")}, {"requests": 0}, {"requests": 10**12}, {"endpoints": 0}],
)
def test_steady_poisson_refuses_invalid_arguments(wrong):
    with pytest.raises(InputError):
        steady_poisson(**({"rate_per_s": 1.0, "requests": 10} | wrong))
