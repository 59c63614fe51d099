"""The simulator against queueing theory: Lindley's recursion, M/D/1, M/M/1, Little's law."""

import numpy as np
import pytest
from fixtures import arrivals, run

from maveriq.units import MICROS_PER_SECOND

LOADS = [0.3, 0.6, 0.9]
DRAWS = 10_000_000


def lindley(gaps: np.ndarray, services: np.ndarray) -> np.ndarray:
    """Return waiting times of a single server: W(n+1) = max(0, W(n) + S(n) - A(n)), by its closed form.

    `gaps[n]` lies between arrivals n and n+1; both arrays have one entry per request.
    """
    walk = np.concatenate([[0], np.cumsum(services[:-1] - gaps[:-1])])
    return walk - np.minimum(np.minimum.accumulate(walk), 0)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("seed", [1, 2])
def test_every_wait_equals_lindleys_recursion(load: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 5_000
    tokens = rng.integers(1, 2_000, count)  # 1 ms each
    services_us = tokens * 1_000
    gaps_us = np.ceil(rng.exponential(services_us.mean() / load, count)).astype(np.int64)
    times_us = 1_000_000 + np.concatenate([[0], np.cumsum(gaps_us[:-1])])
    requests = run(arrivals(times_us, np.ones(count), tokens), {1: [(0,)]}, gpus=1).requests
    assert (requests.start_us - requests.arrival_us).tolist() == lindley(gaps_us, services_us).tolist()
    assert (requests.finish_us - requests.start_us).tolist() == services_us.tolist()


@pytest.mark.parametrize("load", LOADS)
def test_lindleys_recursion_matches_m_d_1(load: float) -> None:
    """Pollaczek-Khinchine for constant service: W = rho S / (2 (1 - rho))."""
    gaps = np.random.default_rng(3).exponential(1 / load, DRAWS)
    assert lindley(gaps, np.ones(DRAWS)).mean() == pytest.approx(load / (2 * (1 - load)), rel=0.02)


@pytest.mark.parametrize("load", LOADS)
def test_lindleys_recursion_matches_m_m_1(load: float) -> None:
    """Pollaczek-Khinchine for exponential service: W = rho S / (1 - rho)."""
    rng = np.random.default_rng(4)
    waits = lindley(rng.exponential(1 / load, DRAWS), rng.exponential(1, DRAWS))
    assert waits.mean() == pytest.approx(load / (1 - load), rel=0.02)


@pytest.mark.parametrize("discipline", ["fifo", "fifo-per-model", "sjf", "edf"])
def test_littles_law(discipline: str) -> None:
    """L = lambda W, with L counted second by second and W from the records."""
    from maveriq.control.controller import ControllerSettings
    from maveriq.control.queues import QueueDiscipline

    rng = np.random.default_rng(5)
    count = 20_000
    times_us = np.cumsum(rng.exponential(0.05 * MICROS_PER_SECOND, count)).astype(np.int64) + 10
    tokens = rng.integers(1, 140, count)
    settings = ControllerSettings(discipline=QueueDiscipline(discipline))
    record = run(
        arrivals(times_us, rng.integers(1, 4, count), tokens),
        {1: [(0,)], 2: [(0, 1)], 3: [(2,)]},
        settings=settings,
    )
    requests = record.requests
    horizon_us = record.ended_us
    looks_us = np.linspace(0, horizon_us, 200_000)
    arrived = np.searchsorted(np.sort(requests.arrival_us), looks_us, side="right")
    gone = np.searchsorted(np.sort(requests.finish_us), looks_us, side="right")
    mean_present = (arrived - gone).mean()
    rate_per_us = count / horizon_us
    mean_stay_us = (requests.finish_us - requests.arrival_us).mean()
    assert mean_present == pytest.approx(rate_per_us * mean_stay_us, rel=0.01)
