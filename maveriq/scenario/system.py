"""A scenario: everything a body needs to run, simulated or real."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from maveriq.control.controller import ControllerSettings, ServiceTimePredictor
from maveriq.domain.cluster import Cluster
from maveriq.domain.faults import Fault, Removal
from maveriq.domain.parallel import DeploymentPlan
from maveriq.estimate.estimator import Estimator
from maveriq.policy.policy import Policy
from maveriq.units import Micros
from maveriq.workload.requests import Workload

LoadTime: TypeAlias = Callable[[DeploymentPlan], Micros]
"""How long an engine takes from the command to its registration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSystem:
    """A cluster, a policy, a workload, and how the world behaves.

    `estimator` is the name of the estimator that the policy plans with, empty where it has none.
    `serve` times simulated requests; None takes the recorded times of the workload.
    The run stops when every request has ended, at the latest `drain_us` after the last arrival.
    GPU samples are taken every `sample_us`. `notes` say what a reader of the results must know.
    """

    cluster: Cluster
    policy: Policy
    workload: Workload
    settings: ControllerSettings
    predict_service_time: ServiceTimePredictor
    estimator: str = ""
    serve: Estimator | None
    load_time: LoadTime
    faults: tuple[Fault, ...] = ()
    removals: tuple[Removal, ...] = ()
    drain_us: Micros
    sample_us: Micros
    notes: tuple[str, ...] = ()
