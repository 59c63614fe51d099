"""What the simulator and the executor run: a serving system, and the workload that is replayed on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from maveriq.control.controller import ControllerSettings, ServiceTimePredictor
from maveriq.domain.cluster import Cluster
from maveriq.domain.faults import Fault, Removal
from maveriq.domain.parallel import DeploymentPlan
from maveriq.policy.policy import Policy
from maveriq.scenario.continuous_engines import ContinuousEngines
from maveriq.scenario.live_engines import LiveEngines
from maveriq.scenario.options import Options
from maveriq.scenario.service_times import ServiceTimes
from maveriq.units import Micros
from maveriq.workload.requests import Workload

LoadTime: TypeAlias = Callable[[DeploymentPlan], Micros]
"""How long an engine takes from the start command to its registration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSystem:
    """A cluster, the policy and settings of its controller, and estimates of how long things take on it.

    Args:
        cluster: nodes and GPUs.
        policy: decides configurations and placement.
        settings: of the controller.
        predict_service_time: what `sjf` and `least-work` go by.
        service_times: how long an execution takes. The simulator and emulated engines take exactly this long;
            the executor's watchdog compares real engines with it.
        load_time: how long an engine takes to load.
        estimator: name of the estimator that the policy plans with; empty if there is none.
        prompt_tokens: length of a typical prompt, for endpoints that do not give one.
        live_engines: the continuous engines of a service; None where there are none, or where a workload has them.
        notes: what a reader of the results must know.
    """

    cluster: Cluster
    policy: Policy
    settings: ControllerSettings
    predict_service_time: ServiceTimePredictor
    service_times: ServiceTimes
    load_time: LoadTime
    estimator: str = ""
    prompt_tokens: int = 1
    live_engines: LiveEngines | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySystem(ServingSystem):
    """A serving system and the workload that it replays, with the faults and removals of the run.

    The run stops when every request has ended, at the latest `drain_us` after the last arrival.
    GPUs are sampled every `sample_us`. `options` are those that it was built from, with the defaults
    of the cluster; None where it was built without options. `engines` makes the continuous engines, None where there
    are none. The client keeps at most `max_in_flight` requests in flight, None for any number.
    """

    workload: Workload
    engines: ContinuousEngines | None = None
    max_in_flight: int | None = None
    faults: tuple[Fault, ...] = ()
    removals: tuple[Removal, ...] = ()
    drain_us: Micros
    sample_us: Micros
    options: Options | None = None
