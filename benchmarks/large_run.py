"""Measure one large run, in a process of its own so that its memory can be measured.

Usage: python benchmarks/large_run.py CLUSTER REQUESTS

The script prints one line of JSON with figures per request: CPU time of the simulation, in µs and in bare SimPy events;
CPU time of writing the files; and the growth of memory since the imports.
"""

from __future__ import annotations

import argparse
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
from large_clusters import CLUSTERS, LargeCluster

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
_STARTED_US = 600 * MICROS_PER_SECOND  # every engine is up by then
_PROBE_REQUESTS = 2_000
_SAMPLES = 2_000
_DRAIN_US = 1_000_000 * MICROS_PER_SECOND  # far longer than any backlog here


def measure(cluster: LargeCluster, requests: int) -> dict[str, float]:
    """Simulate a cluster at 70 % of its capacity, and write the files of the run."""
    imported_bytes = _peak_bytes()
    system = _system(cluster)
    arrivals = _arrivals(cluster, LOAD * _capacity_per_s(system, cluster), requests)
    simpy_timer = SimpyTimer()
    run, both_s = _timed(lambda: simulate(_with(system, arrivals), simpy_timer))
    with tempfile.TemporaryDirectory() as scratch:
        _, files_s = _timed(lambda: write_run(Path(scratch) / "run", run, {}, {}))
    grown_bytes = _peak_bytes() - imported_bytes
    completed = run.requests.counts()[RequestStatus.COMPLETED]
    if completed != requests:
        raise SystemExit(f"{cluster.title}: {completed} of {requests} requests completed, not all")
    simulate_us = (both_s - simpy_timer.spent_s) * 1e6 / requests
    bare_event_us = simpy_timer.spent_s * 1e6 / simpy_timer.events
    return {
        "simulate_us": simulate_us,
        "bare_events": simulate_us / bare_event_us,
        "files_us": files_s * 1e6 / requests,
        "memory_kib": grown_bytes / 1024 / requests,
    }


def _system(cluster: LargeCluster) -> ReplaySystem:
    """Return the default system on a cluster, with the first models of a set, all requested at time 0."""
    system = build_system(Options(gpus=cluster.gpus, models="regular"))
    endpoints = tuple(replace(endpoint, requested_us=0) for endpoint in system.workload.endpoints[: cluster.models])
    return replace(system, workload=replace(system.workload, endpoints=endpoints))


def _with(system: ReplaySystem, arrivals: Arrivals) -> ReplaySystem:
    workload = Workload(name="steady Poisson", endpoints=system.workload.endpoints, arrivals=arrivals)
    sample_us = max(MICROS_PER_SECOND, int(arrivals.arrival_us[-1]) // _SAMPLES)
    return replace(system, workload=workload, drain_us=_DRAIN_US, sample_us=sample_us)


def _arrivals(cluster: LargeCluster, rate_per_s: float, requests: int) -> Arrivals:
    arrivals = steady_poisson(rate_per_s=rate_per_s, requests=requests, endpoints=cluster.models)
    return replace(arrivals, arrival_us=arrivals.arrival_us + _STARTED_US)


def _capacity_per_s(system: ReplaySystem, cluster: LargeCluster) -> float:
    """Return the throughput of the cluster while requests always wait, including dispatch overhead."""
    arrivals = _arrivals(cluster, 1.0, _PROBE_REQUESTS)
    at_once = replace(arrivals, arrival_us=np.full(_PROBE_REQUESTS, _STARTED_US, np.int64))
    requests = simulate(_with(system, at_once)).requests
    return _PROBE_REQUESTS * MICROS_PER_SECOND / float(requests.finish_us.max() - _STARTED_US)


class SimpyTimer:
    """Times bare SimPy events while a run is simulated.

    Both are measured at the same time, so a busy machine slows them alike and their ratio stays.
    """

    _EVENTS = 250

    def __init__(self) -> None:
        self.events = 0
        self.spent_s = 0.0

    def wants_update(self) -> bool:
        """Time a few bare events."""
        _, spent_s = _timed(lambda: _bare_events(self._EVENTS))
        self.spent_s += spent_s
        self.events += self._EVENTS
        return False

    def update(self, progress: Progress) -> None:
        """Do nothing."""


def _bare_events(events: int) -> None:
    """Run SimPy events that only schedule the next event."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cluster", choices=CLUSTERS, help="the cluster to simulate")
    parser.add_argument("requests", type=int, help="number of requests")
    options = parser.parse_args()
    print(json.dumps(measure(CLUSTERS[options.cluster], options.requests)))
