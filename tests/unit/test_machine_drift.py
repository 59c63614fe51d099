"""Laws of what is taken off samples because the machine changed its speed."""

import numpy as np
import pytest

from maveriq.estimate.machine_drift import TimedSamples, machine_drift
from maveriq.streams import generator

SECONDS = np.geomspace(0.05, 1.0, 12)
"""What batches take on a steady machine."""


def measured(*, drift: float, noise: float = 0.05, passes: int = 12, seed: int = 0) -> list[TimedSamples]:
    """Return batches measured in turns on a machine whose speed wanders, by so much in twenty seconds."""
    draw = generator(seed, "drift")
    at_s, slow = 0.0, 0.0
    times: list[list[tuple[float, float]]] = [[] for _ in SECONDS]
    for _ in range(passes):
        for batch, usual_s in enumerate(SECONDS):
            slow = slow * np.exp(-usual_s / 20) + drift * np.sqrt(2 * usual_s / 20) * draw.normal()
            taken_s = usual_s * np.exp(slow + noise * draw.normal())
            at_s += taken_s
            times[batch].append((at_s, taken_s))
    return [TimedSamples(*zip(*samples, strict=True)) for samples in times]


def error(batches: list[TimedSamples], *, corrected: bool) -> float:
    """Return how far medians are from a common multiple of the true times, as a root of mean squares."""
    drift = machine_drift(batches) if corrected else [np.zeros(len(batch.at_s)) for batch in batches]
    logs = [np.median(np.log(batch.seconds) - off) for batch, off in zip(batches, drift, strict=True)]
    return float(np.std(np.array(logs) - np.log(SECONDS)))


def test_medians_of_a_machine_that_changes_its_speed_become_surer() -> None:
    errors = [[error(measured(drift=0.3, seed=seed), corrected=fixed) for seed in range(20)] for fixed in (False, True)]
    assert np.mean(errors[1]) < 0.75 * np.mean(errors[0])


def test_medians_of_a_steady_machine_hardly_change() -> None:
    for seed in range(10):
        batches = measured(drift=0.0, seed=seed)
        assert error(batches, corrected=True) < 1.15 * error(batches, corrected=False) + 0.001
        assert max(np.abs(off).max() for off in machine_drift(batches)) < 0.06


def test_a_machine_that_is_always_slower_is_no_drift() -> None:
    batches = measured(drift=0.2)
    slower = [TimedSamples(batch.at_s, tuple(3 * each for each in batch.seconds)) for batch in batches]
    assert np.concatenate(machine_drift(slower)) == pytest.approx(np.concatenate(machine_drift(batches)))
    assert np.median(np.concatenate(machine_drift(batches))) == pytest.approx(0.0, abs=0.01)


def test_nothing_is_known_from_one_batch_alone() -> None:
    assert machine_drift([]) == []
    (alone,) = machine_drift([TimedSamples((1.0, 2.0), (0.5, 0.9))])
    assert alone.tolist() == [0.0, 0.0]
    far = machine_drift([TimedSamples((1.0, 2.0), (0.5, 0.9)), TimedSamples((1e6, 1e6 + 1), (0.5, 0.9))])
    assert np.concatenate(far).tolist() == [0.0] * 4
