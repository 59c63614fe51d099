"""One large run, in a process of its own so that its memory is its own.

Usage: python benchmarks/large_run.py WORLD REQUESTS

Prints one line of JSON, all per request: CPU time of the simulation, in µs and in events of SimPy
alone; CPU time of the files; and how far memory grew over what it was after the imports.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import simpy
from large_worlds import WORLDS, World

from maveriq.domain.progress import Progress
from maveriq.domain.requests import RequestStatus
from maveriq.report.run_folder import write_run
from maveriq.scenario.build import build_system
from maveriq.scenario.options import Options
from maveriq.scenario.system import ReplaySystem
from maveriq.sim.simulator import simulate
from maveriq.units import MICROS_PER_SECOND
from maveriq.workload.arrivals import steady_poisson
from maveriq.workload.requests import Arrivals, Workload

LOAD = 0.7
_STARTED_US = 600 * MICROS_PER_SECOND  # by then every engine is up
_PROBE_REQUESTS = 2_000
_SAMPLES = 2_000
_DRAIN_US = 1_000_000 * MICROS_PER_SECOND  # far longer than any backlog here takes to serve


def measure(world: World, requests: int) -> dict[str, float]:
    """Run a world at 70 % of what it can serve, and write its files."""
    imported_bytes = _peak_bytes()
    scenario = _scenario(world)
    arrivals = _arrivals(world, LOAD * _capacity_per_s(scenario, world), requests)
    pace = _Pace()
    run, both_s = _timed(lambda: simulate(_with(scenario, arrivals), pace))
    with tempfile.TemporaryDirectory() as scratch:
        _, files_s = _timed(lambda: write_run(Path(scratch) / "run", run, {}, {}))
    grown_bytes = _peak_bytes() - imported_bytes
    completed = run.requests.counts()[RequestStatus.COMPLETED]
    if completed != requests:
        raise SystemExit(f"{world.title}: {completed} of {requests} requests completed; this measures something else")
    simulate_us = (both_s - pace.spent_s) * 1e6 / requests
    bare_event_us = pace.spent_s * 1e6 / pace.events
    return {
        "simulate_us": simulate_us,
        "bare_events": simulate_us / bare_event_us,
        "files_us": files_s * 1e6 / requests,
        "memory_kib": grown_bytes / 1024 / requests,
    }


def _scenario(world: World) -> ReplaySystem:
    """Return the default scenario on another cluster, with the first models of a set, all asked for at 0."""
    scenario = build_system(Options(gpus=world.gpus, models="regular"))
    endpoints = tuple(replace(endpoint, requested_us=0) for endpoint in scenario.workload.endpoints[: world.models])
    return replace(scenario, workload=replace(scenario.workload, endpoints=endpoints))


def _with(scenario: ReplaySystem, arrivals: Arrivals) -> ReplaySystem:
    workload = Workload(name="steady Poisson", endpoints=scenario.workload.endpoints, arrivals=arrivals)
    sample_us = max(MICROS_PER_SECOND, int(arrivals.arrival_us[-1]) // _SAMPLES)
    return replace(scenario, workload=workload, drain_us=_DRAIN_US, sample_us=sample_us)


def _arrivals(world: World, rate_per_s: float, requests: int) -> Arrivals:
    arrivals = steady_poisson(rate_per_s=rate_per_s, requests=requests, endpoints=world.models)
    return replace(arrivals, arrival_us=arrivals.arrival_us + _STARTED_US)


def _capacity_per_s(scenario: ReplaySystem, world: World) -> float:
    """Return what the cluster completes when it is never short of requests, dispatcher and all."""
    arrivals = _arrivals(world, 1.0, _PROBE_REQUESTS)
    at_once = replace(arrivals, arrival_us=np.full(_PROBE_REQUESTS, _STARTED_US, np.int64))
    requests = simulate(_with(scenario, at_once)).requests
    return _PROBE_REQUESTS * MICROS_PER_SECOND / float(requests.finish_us.max() - _STARTED_US)


class _Pace:
    """Looks on at a run, and in between times SimPy alone.

    Both are measured in the same moments: a busy machine slows them alike, and their ratio stays.
    """

    _EVENTS = 250

    def __init__(self) -> None:
        self.events = 0
        self.spent_s = 0.0

    def wants_update(self) -> bool:
        """Run a few bare events."""
        _, spent_s = _timed(lambda: _bare_events(self._EVENTS))
        self.spent_s += spent_s
        self.events += self._EVENTS
        return False

    def update(self, progress: Progress) -> None:
        """Do nothing."""


def _bare_events(events: int) -> None:
    """Run events of SimPy that do nothing but put the next on the calendar."""
    env = simpy.Environment()
    left = events

    def again(_: simpy.Event) -> None:
        nonlocal left
        left -= 1
        if left:
            env.timeout(1).callbacks.append(again)

    env.timeout(1).callbacks.append(again)
    env.run()


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start_s = time.process_time()
    result = work()
    return result, time.process_time() - start_s


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


if __name__ == "__main__":
    print(json.dumps(measure(WORLDS[sys.argv[1]], int(sys.argv[2]))))
