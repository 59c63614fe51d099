"""The lag of the control plane: what is measured of it, and when it distorts a run."""

import asyncio

import pytest
from fixtures import arrivals, scenario

from maveriq.exec.control_lag import ControlLag
from maveriq.exec.launcher import ProcessLauncher
from maveriq.exec.replay import ReplaySettings, execute
from maveriq.units import micros


def lag(*, planned: bool, time_scale: float = 0.1, arrival_late_s: float = 0.0, longer_s: float = 0.1) -> ControlLag:
    """Ten executions of planned 1 s that take `longer_s` more; their engines say 1.05 s of the run."""
    found = ControlLag(time_scale, planned=planned)
    for second in range(10):
        due_us = micros(10.0 * second)
        found.arrived(due_us, due_us + micros(arrival_late_s))
        found.execution_started(1, due_us, micros(1))
        found.execution_ended(1, due_us + micros(1 + longer_s), 1.05 * time_scale)
    return found


def test_emulated_engines_should_take_the_planned_time() -> None:
    found = lag(planned=True, arrival_late_s=0.02).summary()
    assert found is not None
    assert (found.arrival_mean_s, found.execution_mean_s) == pytest.approx((0.02, 0.1))
    assert (found.execution_p99_s, found.service_mean_s) == pytest.approx((0.1, 1.0))
    assert found.share == pytest.approx(0.12)


def test_other_engines_measure_themselves() -> None:
    found = lag(planned=False).summary()
    assert found is not None
    assert (found.execution_mean_s, found.service_mean_s) == pytest.approx((0.05, 1.05))


def test_a_lag_that_distorts_is_a_warning_with_a_remedy() -> None:
    distorted, fine = lag(planned=True).summary(), lag(planned=True, longer_s=0.001).summary()
    assert distorted is not None
    assert fine is not None
    assert distorted.distorts
    assert distorted.note().startswith("WARNING: control plane lag: arrivals 0.0 ms late (p99 0.0), executions 10.0 ms")
    assert distorted.note().endswith("use a larger --time-scale or a less busy host")
    assert not fine.distorts
    assert fine.note().endswith("in real time, 0.1 % of a mean service time")
    real_time = lag(planned=True, time_scale=1.0).summary()
    assert real_time is not None
    assert real_time.note().endswith("use a less busy host")


def test_nothing_executed_has_no_lag() -> None:
    assert ControlLag(1.0, planned=True).summary() is None


@pytest.mark.heavy
def test_a_run_reports_its_lag(tmp_path) -> None:
    """Executions of 50 ms at a time scale of 0.01 take 0.5 ms: no control plane is that fast.

    The engine has 4 real seconds to start before the first request.
    """
    system = scenario(arrivals([micros(400), micros(401)], [1, 1], [50, 50]), {1: [(0,)]})

    async def replay():
        with ProcessLauncher("emulated", logs=tmp_path) as launcher:
            return await execute(system, launcher, ReplaySettings(time_scale=0.01, planned_times=True))

    found = asyncio.run(replay()).lag
    assert found is not None
    assert found.service_mean_s == pytest.approx(0.05)
    assert found.execution_mean_s > 0
    assert found.distorts
