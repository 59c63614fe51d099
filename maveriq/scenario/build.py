"""Who plans and who times simulated service: names and defaults become estimators.

The workload that options describe.
Building a scenario from options: the one place where names become objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

from maveriq.control.controller import ControllerSettings, OnFailure, ServiceTimePredictor
from maveriq.control.deployment_manager import Deployment
from maveriq.control.queues import QueueDiscipline
from maveriq.control.router import RoutingRule
from maveriq.domain.cluster import Cluster, DispatchTiming
from maveriq.domain.faults import check_fault, check_removal, parse_fault, parse_removal
from maveriq.domain.parallel import DeploymentPlan
from maveriq.domain.requests import Request
from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.calibrated import CalibratedEstimator
from maveriq.estimate.cluster_spec import cluster_from
from maveriq.estimate.estimator import Estimator
from maveriq.estimate.hardware_profile import GpuKind, HardwareProfile, load_profile
from maveriq.estimate.registry import CALIBRATED, ESTIMATORS, default_estimator, make_estimator, note_on_default
from maveriq.policy.alpaserve.policy import StaticPlacementPolicy
from maveriq.policy.policy import Policy
from maveriq.policy.registry import make_policy
from maveriq.scenario.options import Options
from maveriq.scenario.static_placement import STATIC_POLICIES, search_static_placement
from maveriq.scenario.system import LoadTime, ServingSystem
from maveriq.scenario.workload import workload_for
from maveriq.units import MICROS_PER_SECOND, Micros, duration_micros, gib, micros
from maveriq.workload.requests import Workload

RECORDED = "recorded"
"""The value of `service_times` that takes the workload's own recorded times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimators:
    """Belief and world: `plan` is what the policy plans with, `serve` times service (None: recorded times do).

    `notes` say what a reader of the results must know of them.
    """

    plan: Estimator
    serve: Estimator | None
    notes: tuple[str, ...] = ()


def estimators_for(options: Options, profile: HardwareProfile) -> Estimators:
    """Return the estimators that options name, or the best ones that the profile can feed.

    Raises:
        InputError: an unknown name, a profile without what it needs, a recorded run that cannot be left out.
    """
    note = note_on_default(profile)  # who named both knows
    return Estimators(
        plan=make_estimator(options.estimator or default_estimator(profile), profile),
        serve=_server(options.service_times or default_estimator(profile), profile, options.exclude_run),
        notes=(note,) if note and not (options.estimator and options.service_times) else (),
    )


def _server(name: str, profile: HardwareProfile, without_run: str | None) -> Estimator | None:
    if name not in (*ESTIMATORS, RECORDED):
        raise UnknownNameError("estimator", name, [*ESTIMATORS, RECORDED])
    if without_run is not None:
        if name != CALIBRATED:
            raise InputError(f"--exclude-run applies to --service-times calibrated, not to {name!r}; leave it out")
        return CalibratedEstimator.serving(profile, without_run=without_run)
    return None if name == RECORDED else make_estimator(name, profile)


_MAX_SAMPLES, _MAX_SAMPLES_OF_ALL_GPUS = 2_000, 1_000_000
_MAX_KNOWN = 1_000_000
_Choice = TypeVar("_Choice", bound=StrEnum)


def build_system(
    options: Options,
    *,
    planning: Callable[[Estimator], Estimator] = lambda one: one,
    clusters: Callable[[str, HardwareProfile], Cluster] | None = None,
) -> ServingSystem:
    """Turn options into a scenario, reading every file that they name.

    Args:
        options: what the user says.
        planning: turns the estimator that the options name for planning into the one that is planned with.
        clusters: turns what the options say of GPUs into a cluster; None for `cluster_for`.

    Raises:
        InputError: an option or a file that cannot be used.
    """
    profile = load_profile(options.profile)
    cluster = (clusters or cluster_for)(options.gpus, profile)
    estimators = estimators_for(options, profile)
    planner = planning(estimators.plan)
    workload = workload_for(options, profile, slo_scale=options.slo_scale)
    policy, notes = _policy(options, profile, cluster, planner, workload)
    drain_us = profile.drain_us if options.drain_s is None else micros(options.drain_s)
    last_arrival_us = int(workload.arrivals.arrival_us[-1])
    faults = tuple(parse_fault(text) for text in options.fail)
    for fault in faults:
        check_fault(
            fault, gpus=len(cluster), requested_us=_asked_us(policy, workload), end_us=last_arrival_us + drain_us
        )
    removals = tuple(parse_removal(text) for text in options.remove)
    for removal in removals:
        check_removal(removal, requested_us=[endpoint.requested_us for endpoint in workload.endpoints])
    return ServingSystem(
        cluster=cluster,
        policy=policy,
        workload=workload,
        settings=controller_settings(options, profile),
        predict_service_time=service_time_predictor(planner),
        estimator=estimators.plan.name,
        serve=estimators.serve,
        load_time=load_time_for(options, profile),
        faults=faults,
        removals=removals,
        drain_us=drain_us,
        sample_us=_sample_us(workload, drain_us, len(cluster)),
        notes=(*estimators.notes, *notes),
    )


def _policy(
    options: Options, profile: HardwareProfile, cluster: Cluster, planner: Estimator, workload: Workload
) -> tuple[Policy, tuple[str, ...]]:
    """Return the policy, and what a reader of its results must know."""
    _refuse_without_effect(options)
    if options.policy in STATIC_POLICIES:
        return search_static_placement(options, profile, cluster, planner, workload)
    policy = make_policy(
        options.policy,
        estimator=planner,
        accuracy=profile.accuracy,
        packing_threshold=options.packing_threshold,
        others=STATIC_POLICIES,
    )
    return policy, ()


def _refuse_without_effect(options: Options) -> None:
    """Refuse what a user said to a policy that has no use for it: the run would not be what they think."""
    ahead = options.policy in STATIC_POLICIES
    useless = ("intent", "min_accuracy", "float16_only") if ahead else (
        "alpaserve_profile", "alpaserve_as_published", "alpaserve_star_rule",
    )  # fmt: skip
    default = Options()
    for name in useless:
        if getattr(options, name) != getattr(default, name):
            for_whom = "policies that go by intents" if ahead else " and ".join(STATIC_POLICIES)
            raise InputError(
                f"--{name.replace('_', '-')} applies to {for_whom}, not to {options.policy!r}; leave it out"
            )


def _asked_us(policy: Policy, workload: Workload) -> list[Micros]:
    """Return when each deployment is asked for, in the order of their numbers; a rejected ask takes one too."""
    return [
        endpoint.requested_us
        for endpoint in workload.endpoints
        for _ in range(
            max(1, policy.replicas(endpoint.endpoint_id)) if isinstance(policy, StaticPlacementPolicy) else 1
        )
    ]


def cluster_for(gpus: str, profile: HardwareProfile) -> Cluster:
    """Return the cluster of a text or file, checked against the profile.

    Raises:
        InputError: not a cluster, or GPUs that the profile was not measured on.
    """
    own = GpuKind(name=profile.gpu_kind, capacity_bytes=profile.capacity_bytes, idle_bytes=profile.idle_bytes)
    cluster = cluster_from(gpus, own)
    for gpu in cluster.gpus:
        if gpu.kind != profile.gpu_kind:
            raise InputError(
                f"profile {profile.name!r} was measured on {profile.gpu_kind}, but GPU {gpu.gpu_id} of cluster "
                f"{cluster.name!r} is a {gpu.kind}; give a profile of that GPU with --profile FILE"
            )
    return cluster


def controller_settings(options: Options, profile: HardwareProfile) -> ControllerSettings:
    """Return how the controller is to work.

    Raises:
        UnknownNameError: a queue or another choice that there is not.
    """
    return ControllerSettings(
        timing=_timing(options, profile.timing),
        discipline=_choice(QueueDiscipline, "queue", options.queue),
        max_wait_us=micros(options.max_wait_s),
        on_failure=_choice(OnFailure, "--on-failure", options.on_failure),
        router=_choice(RoutingRule, "router", options.router),
        seed=options.seed,
        load_window=profile.load_window,
    )


def _choice(kind: type[_Choice], what: str, text: str) -> _Choice:
    try:
        return kind(text.replace("_", "-"))
    except ValueError:
        raise UnknownNameError(what, text, [one.value for one in kind]) from None


def _timing(options: Options, measured: DispatchTiming) -> DispatchTiming:
    """Return the testbed's timing with what the user set or switched off."""
    said: dict[str, Micros] = {}
    for name, value, unit_s in (
        ("tick_us", options.tick_ms, 1e-3),
        ("after_arrival_us", options.after_arrival_ms, 1e-3),
        ("after_release_us", options.after_release_ms, 1e-3),
        ("registration_delay_us", options.registration_delay_s, 1.0),
    ):
        if value is not None:
            said[name] = micros(value * unit_s)
    return replace(DispatchTiming() if options.no_dispatch_overhead else measured, **said)


def load_time_for(options: Options, profile: HardwareProfile) -> LoadTime:
    """Return how long engines are believed to load: as the user says, else as the profile does."""

    def load_time(plan: DeploymentPlan) -> Micros:
        if options.load_s is not None:
            return micros(options.load_s)
        return duration_micros(profile.load_time_s(plan.model, plan.configuration, gib(max(plan.gpu_bytes))))

    return load_time


def service_time_predictor(planner: Estimator) -> ServiceTimePredictor:
    """Guess a request's service from its prompt and the output length that was planned for.

    The true output length is not known before a request has run.
    """
    known: dict[tuple[int, int], Micros] = {}

    def predict_service_time(deployment: Deployment, request: Request) -> Micros:
        key = (deployment.deployment_id, request.prompt_tokens)
        if key not in known:
            service = planner.service(
                deployment.endpoint.model,
                deployment.layout.configuration,
                prompt_tokens=request.prompt_tokens,
                output_tokens=deployment.endpoint.output_tokens,
                batch=1,
            )
            if len(known) >= _MAX_KNOWN:  # a service never ends
                known.clear()
            known[key] = duration_micros(service.latency_s)
        return known[key]

    return predict_service_time


def _sample_us(workload: Workload, drain_us: Micros, gpus: int) -> Micros:
    """Return how often to sample GPUs: each second, or rarer in a long run or on a very large cluster."""
    longest_us = int(workload.arrivals.arrival_us[-1]) + drain_us
    samples = min(_MAX_SAMPLES, max(1, _MAX_SAMPLES_OF_ALL_GPUS // gpus))
    return MICROS_PER_SECOND * max(1, math.ceil(longest_us / MICROS_PER_SECOND / samples))
