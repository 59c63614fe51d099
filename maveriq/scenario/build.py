"""Building a serving system from options: the one place where names become objects."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from maveriq.control.controller import ControllerSettings, OnFailure, OnLoss, ServiceTimePredictor
from maveriq.control.deployment_manager import Deployment
from maveriq.control.queues import QueueDiscipline
from maveriq.control.router import RequestRouter
from maveriq.domain.cluster import Cluster, ClusterState, DispatchTiming
from maveriq.domain.faults import Fault, Removal, check_fault, check_removal, parse_fault, parse_removal
from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import DeploymentPlan
from maveriq.domain.requests import Request
from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.by_model import JOINED, with_profiled
from maveriq.estimate.calibrated import CalibratedEstimator
from maveriq.estimate.cluster_estimator import estimator_for, notes_on_defaults, on_cluster
from maveriq.estimate.cluster_profiles import ClusterProfiles, profiles_for
from maveriq.estimate.cluster_spec import cluster_from
from maveriq.estimate.estimator import Estimator
from maveriq.estimate.hardware_profile import HardwareProfile, gpu_kind
from maveriq.estimate.registry import BLENDED, CALIBRATED, ESTIMATORS, PHYSICS, default_estimator
from maveriq.policy.alpaserve.policy import StaticPlacementPolicy
from maveriq.policy.baselines import BASELINES
from maveriq.policy.maveriq import PlacementRule, TieBreak
from maveriq.policy.pinned import PinnedPlacementPolicy
from maveriq.policy.policy import Policy
from maveriq.policy.registry import RULES, make_policy, policy_of_rule
from maveriq.scenario.beyond_context import note_on_engine_tokens, note_on_long_requests, refuses_long_requests
from maveriq.scenario.cluster_notes import note_on_cluster
from maveriq.scenario.continuous_engines import ContinuousEngines
from maveriq.scenario.defaults import choice, resolved, with_cluster_defaults
from maveriq.scenario.engine_estimates import PlannedEngines
from maveriq.scenario.live_engines import LiveEngines
from maveriq.scenario.options import Options
from maveriq.scenario.replica_endpoints import with_published_requests
from maveriq.scenario.routing import routing_rule
from maveriq.scenario.service_times import RECORDED, EstimatedServiceTimes, RecordedServiceTimes, ServiceTimes
from maveriq.scenario.static_placement import STATIC_POLICIES, search_static_placement
from maveriq.scenario.system import LoadTime, ReplaySystem, ServingSystem
from maveriq.scenario.workload import with_memory_shares, with_token_slos, workload_for
from maveriq.units import MICROS_PER_SECOND, Micros, duration_micros, gib, micros
from maveriq.workload.model_sets import ContinuousSettings, load_model_set
from maveriq.workload.requests import Workload

_MAX_SAMPLES, _MAX_SAMPLES_OF_ALL_GPUS = 2_000, 1_000_000
_MAX_CACHED = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """Objects that replace what options name; None where the options decide.

    A `placement_rule` makes a policy of its own. A router keeps state: give each run a new one.
    """

    policy: Policy | None = None
    placement_rule: PlacementRule | None = None
    estimator: Estimator | None = None
    service_times: Estimator | ServiceTimes | None = None
    router: RequestRouter | None = None

    @property
    def replaced(self) -> tuple[str, ...]:
        """The options in whose place an object was given."""
        given = (
            ("policy", self.policy if self.placement_rule is None else self.placement_rule),
            ("estimator", self.estimator),
            ("service_times", self.service_times),
            ("router", self.router),
        )
        return tuple(name for name, component in given if component is not None)


def build_system(
    options: Options,
    *,
    components: Components = Components(),
    wrap_estimator: Callable[[Estimator], Estimator] | None = None,
    make_cluster: Callable[[str, ClusterProfiles], Cluster] | None = None,
    engine_tokens: Callable[[ModelSpec], int | None] | None = None,
    slo_ttft_s: float | None = None,
    slo_tpot_s: float | None = None,
) -> ReplaySystem:
    """Build the system that options describe, with the workload that it replays; read every file that they name.

    Args:
        options: the user's options.
        components: objects to use instead of what the options name.
        wrap_estimator: wraps the estimator that the policy plans with, for instance to rule out what an
            engine does not support.
        make_cluster: makes the cluster from `options.gpus`; None for `cluster_for`.
        engine_tokens: how many tokens an engine keeps of one sequence of a model, see `ControllerSettings`.
        slo_ttft_s: SLO on the first token, by which continuous engines are chosen; None for none.
        slo_tpot_s: likewise on each further token.

    Raises:
        InputError: an option or a file that cannot be used.
    """
    profiles = profiles_for(options.profile, options.gpus, options.accuracy)
    profile, cluster = profiles.main, (make_cluster or cluster_for)(options.gpus, profiles)
    options = with_cluster_defaults(options, profile, cluster)
    workload = with_token_slos(
        with_memory_shares(
            workload_for(options, profile, slo_scale=options.slo_scale), models=options.models, profiles=profiles
        ),
        slo_ttft_s=slo_ttft_s,
        slo_tpot_s=slo_tpot_s,
    )
    models = [endpoint.model for endpoint in workload.endpoints]
    name, estimator = _estimator(options, profiles, cluster, wrap_estimator, components.estimator, models)
    engines = _continuous_engines(options, profiles, cluster, components)
    if engines is not None:
        engine_tokens = engines.sequence_limit(workload.endpoints)
    planned = None if engines is None else PlannedEngines(engines=engines, restrict=wrap_estimator)
    given_policy = _given_policy(components, profiles, estimator, planned)
    policy, notes = (
        (given_policy, ()) if given_policy else _policy(options, profiles, cluster, estimator, workload, planned)
    )
    if options.alpaserve_requests_as_published:
        policy, workload = with_published_requests(policy, workload, options)
    drain_us = profile.drain_us if options.drain_s is None else micros(options.drain_s)
    return ReplaySystem(
        cluster=cluster,
        policy=policy,
        settings=replace(
            _controller_settings(options, profile),
            router=components.router or routing_rule(options.router, workload.endpoints),
            engine_tokens=engine_tokens,
        ),
        predict_service_time=_service_time_predictor(estimator),
        service_times=_given_service_times(components) or _service_times(options, profiles, cluster, workload, models),
        load_time=_load_time(options, profiles),
        estimator=name,
        prompt_tokens=profile.prompt_tokens,
        notes=(
            *_notes(options, profiles, cluster, components, models),
            *(() if engines is None else engines.notes_on_computed_steps()),
            *notes,
            *note_on_long_requests(options, profile, workload),
            *note_on_engine_tokens(workload, engine_tokens),
        ),
        workload=workload,
        engines=engines,
        max_in_flight=options.max_in_flight,
        faults=_faults(options, cluster, policy, workload, drain_us),
        removals=_removals(options, workload),
        drain_us=drain_us,
        sample_us=_sample_us(workload, drain_us, len(cluster)),
        options=options,
    )


def _continuous_engines(
    options: Options, profiles: ClusterProfiles, cluster: Cluster, components: Components
) -> ContinuousEngines | None:
    """Return the continuous engines of the model set, None if it has none.

    Raises:
        InputError: an option that does not apply to them yet.
    """
    entries = load_model_set(options.models).entries
    settings = {number: entry.engine for number, entry in enumerate(entries, start=1) if entry.engine is not None}
    if not settings:
        return None
    what = "engines that batch continuously"
    continuous = {entry.model for entry in entries if entry.engine is not None}
    for entry in entries:
        if entry.engine is None and entry.model in continuous:
            raise InputError(
                f"model set {options.models!r} has {entry.model.name} with {what} and with exclusive ones; give it one "
                "kind of engine"
            )
    if options.policy in STATIC_POLICIES:
        raise InputError(
            f"policy {options.policy!r} plans for exclusive engines, not for {what}; give another --policy"
        )
    chosen = {options.service_times or default_estimator(profile) for profile in profiles.by_kind.values()}
    if components.service_times is not None or not chosen <= {PHYSICS, BLENDED}:
        raise InputError(
            f"steps of {what} are timed by {PHYSICS}, or by {BLENDED} with a planned profile; give --service-times "
            f"{PHYSICS}"
        )
    return ContinuousEngines(
        settings=settings,
        profiles=profiles,
        largest_node=cluster.largest_node,
        blended=_blended_kinds(options, profiles),
    )


def _blended_kinds(options: Options, profiles: ClusterProfiles) -> frozenset[str]:
    """Return the kinds of GPU whose engines take as long as their profile measured."""
    return frozenset(
        kind
        for kind, profile in profiles.by_kind.items()
        if (options.service_times or default_estimator(profile)) == BLENDED
    )


def build_live_system(
    options: Options,
    *,
    wrap_estimator: Callable[[Estimator], Estimator] | None = None,
    make_cluster: Callable[[str, ClusterProfiles], Cluster] | None = None,
    engine_tokens: Callable[[ModelSpec], int | None] | None = None,
    profiled: dict[str, tuple[ModelSpec, Estimator]] | None = None,
) -> tuple[ServingSystem, PinnedPlacementPolicy]:
    """Build a system without a workload, for `maveriq serve`, and return it with its policy.

    Requests are dispatched at once, without the delays of the testbed that the profile was measured on.

    Args:
        options: the user's options; those of workloads, intents and faults are not used.
        wrap_estimator: as in `build_system`.
        make_cluster: as in `build_system`.
        engine_tokens: as in `build_system`.
        profiled: estimators of models by name, which may grow while the system runs: they count before those that the
            options name, and other models that were not measured are estimated by physics. None for no such models.

    Raises:
        InputError: an option or a file that cannot be used.
    """
    profiles = profiles_for(options.profile, options.gpus, options.accuracy)
    profile, cluster = profiles.main, (make_cluster or cluster_for)(options.gpus, profiles)
    options = with_cluster_defaults(replace(options, no_dispatch_overhead=True), profile, cluster, live=True)
    if profiled is not None:
        options = replace(
            options,
            estimator=options.estimator or _with_physics(profiles),
            service_times=options.service_times or _with_physics(profiles),
        )
    estimator = estimator_for(cluster, profiles, options.estimator)
    name, service_times = estimator.name, _service_times(options, profiles, cluster, workload=None)
    if profiled is not None:
        estimator = with_profiled(estimator, profiled)
    estimator = wrap_estimator(estimator) if wrap_estimator else estimator

    engine_settings: dict[int, ContinuousSettings] = {}
    engines = ContinuousEngines(
        settings=engine_settings,
        profiles=profiles,
        largest_node=cluster.largest_node,
        blended=_blended_kinds(options, profiles),
    )
    planned = PlannedEngines(engines=engines, restrict=wrap_estimator)

    def policy(name: str) -> Policy:
        return make_policy(
            name,
            engines=planned,
            estimator=estimator,
            accuracy=profiles.accuracy,
            packing_threshold=options.packing_threshold,
            tie_break=choice(TieBreak, "tie break", options.tie_break),
            evidence=profiles.measured_ratio,
            cost=profiles.min_cost,
        )

    placements = PinnedPlacementPolicy(
        default=policy(resolved(options.policy)), by_name={rule: policy(rule) for rule in RULES}
    )
    system = ServingSystem(
        cluster=cluster,
        policy=placements,
        settings=replace(
            _controller_settings(options, profile, live=True),
            router=routing_rule(options.router),
            engine_tokens=engine_tokens,
        ),
        predict_service_time=_service_time_predictor(estimator),
        service_times=service_times,
        load_time=_load_time(options, profiles),
        estimator=name,
        prompt_tokens=profile.prompt_tokens,
        live_engines=LiveEngines(engines=engines, settings=engine_settings),
        notes=_notes(options, profiles, cluster),
    )
    return system, placements


def _with_physics(profiles: ClusterProfiles) -> str | None:
    """Return the default estimator of a kind of GPU with physics for the models of which nothing was measured."""
    name = default_estimator(profiles.main)
    return None if name in (PHYSICS, BLENDED) or len(profiles.by_kind) > 1 else f"{name}{JOINED}{PHYSICS}"


def _estimator(
    options: Options,
    profiles: ClusterProfiles,
    cluster: Cluster,
    wrap: Callable[[Estimator], Estimator] | None,
    given: Estimator | None = None,
    models: Collection[ModelSpec] = (),
) -> tuple[str, Estimator]:
    """Return the name of the estimator to plan with, and the estimator."""
    estimator = given or estimator_for(cluster, profiles, options.estimator, models=models)
    return estimator.name, wrap(estimator) if wrap else estimator


def _given_service_times(components: Components) -> ServiceTimes | None:
    given = components.service_times
    if given is None or isinstance(given, ServiceTimes):
        return given
    return EstimatedServiceTimes(given)


def _service_times(
    options: Options,
    profiles: ClusterProfiles,
    cluster: Cluster,
    workload: Workload | None,
    models: Collection[ModelSpec] = (),
) -> ServiceTimes:
    """Return what `--service-times` names, by default the best that the profiles have data for."""
    name = options.service_times
    if name is not None and not {"+", JOINED} & set(name) and name not in (*ESTIMATORS, RECORDED):
        raise UnknownNameError("estimator", name, [*ESTIMATORS, RECORDED])
    if options.exclude_run is not None:
        return EstimatedServiceTimes(
            on_cluster(_calibrated_without_run(options, profiles, options.exclude_run), cluster)
        )
    if name != RECORDED:
        return EstimatedServiceTimes(estimator_for(cluster, profiles, name, models=models))
    if workload is None:
        raise InputError("--service-times recorded replays recorded times, and a live service has none; leave it out")
    if workload.arrivals.has_turns:
        raise InputError("--service-times recorded: turns of sessions are sent in an order of their own; leave it out")
    if workload.arrivals.service_us is None:
        raise InputError(
            f"workload {workload.name!r} has no recorded service times; "
            "give a schedule with a service_s column, or another --service-times"
        )
    return RecordedServiceTimes(workload.arrivals.service_us)


def _calibrated_without_run(options: Options, profiles: ClusterProfiles, run: str) -> dict[str, Estimator]:
    name = options.service_times or default_estimator(profiles.main)
    if name != CALIBRATED:
        raise InputError(f"--exclude-run applies to --service-times calibrated, not to {name!r}; leave it out")
    if len(profiles.by_kind) > 1:
        raise InputError(
            f"--exclude-run applies to GPUs of one kind, not to {', '.join(profiles.by_kind)}; leave it out"
        )
    return {profiles.main.gpu_kind: CalibratedEstimator.serving(profiles.main, without_run=run)}


def _notes(
    options: Options,
    profiles: ClusterProfiles,
    cluster: Cluster,
    components: Components = Components(),
    models: Collection[ModelSpec] = (),
) -> tuple[str, ...]:
    """Return what the cluster is made of, unless its name says it, and notes on default estimators not chosen."""
    chosen = (options.estimator or components.estimator) and (options.service_times or components.service_times)
    return (*note_on_cluster(cluster), *(() if chosen else notes_on_defaults(profiles, models)))


def _faults(
    options: Options, cluster: Cluster, policy: Policy, workload: Workload, drain_us: Micros
) -> tuple[Fault, ...]:
    faults = tuple(parse_fault(text) for text in options.fail)
    last_us = sys.maxsize if workload.reacts else int(workload.arrivals.arrival_us[-1]) + drain_us
    requested_us = _deployments_requested_us(policy, workload, gpus=len(cluster))
    for fault in faults:
        check_fault(fault, gpus=len(cluster), requested_us=requested_us, end_us=last_us)
    return faults


def _removals(options: Options, workload: Workload) -> tuple[Removal, ...]:
    removals = tuple(parse_removal(text) for text in options.remove)
    for removal in removals:
        check_removal(removal, requested_us=[endpoint.requested_us for endpoint in workload.endpoints])
    return removals


def _policy(
    options: Options,
    profiles: ClusterProfiles,
    cluster: Cluster,
    estimator: Estimator,
    workload: Workload,
    engines: PlannedEngines | None,
) -> tuple[Policy, tuple[str, ...]]:
    """Return the policy, and notes on it."""
    _refuse_ignored_options(options)
    if options.policy in STATIC_POLICIES:
        if any(endpoint.replicas for endpoint in workload.endpoints):
            raise InputError(
                f"policy {options.policy!r} chooses the replicas of each model; leave replicas out of model set "
                f"{options.models!r}, or give another --policy"
            )
        return search_static_placement(options, profiles.main, cluster, estimator, workload)
    policy = make_policy(
        resolved(options.policy),
        estimator=estimator,
        accuracy=profiles.accuracy,
        packing_threshold=options.packing_threshold,
        tie_break=choice(TieBreak, "tie break", options.tie_break),
        evidence=profiles.measured_ratio,
        cost=profiles.min_cost,
        engines=engines,
        endpoints=workload.endpoints,
        idle=ClusterState(cluster).view([0.0] * len(cluster)),
        others=STATIC_POLICIES,
    )
    return policy, ()


def _given_policy(
    components: Components, profiles: ClusterProfiles, estimator: Estimator, engines: PlannedEngines | None
) -> Policy | None:
    if components.placement_rule is not None:
        return policy_of_rule(
            components.placement_rule,
            estimator=estimator,
            accuracy=profiles.accuracy,
            evidence=profiles.measured_ratio,
            cost=profiles.min_cost,
            engines=engines,
        )
    return components.policy


def _refuse_ignored_options(options: Options) -> None:
    """Refuse options that the policy ignores, since the run would not be what the user expects."""
    static, by_intent = options.policy in STATIC_POLICIES, options.policy not in (*STATIC_POLICIES, *BASELINES)
    for_static = (
        "alpaserve_profile", "alpaserve_as_published", "alpaserve_requests_as_published", "alpaserve_star_rule",
    )  # fmt: skip
    ignored = (*(() if by_intent else ("intent", "min_accuracy", "float16_only")), *(() if static else for_static))
    default = Options()
    for name in ignored:
        if getattr(options, name) != getattr(default, name):
            users = " and ".join(STATIC_POLICIES) if name in for_static else "policies that go by intents"
            raise InputError(f"--{name.replace('_', '-')} applies to {users}, not to {options.policy!r}; leave it out")


def _deployments_requested_us(policy: Policy, workload: Workload, *, gpus: int) -> list[Micros]:
    """Return when each deployment is requested, in the order of their numbers; a rejected endpoint takes one too.

    Where the policy will choose how many replicas a load needs, as many as there are GPUs are possible.
    """
    return [
        endpoint.requested_us
        for endpoint in workload.endpoints
        for _ in range(
            max(1, policy.replicas(endpoint.endpoint_id))
            if isinstance(policy, StaticPlacementPolicy)
            else endpoint.replicas or (1 if endpoint.load is None else gpus)
        )
    ]


def cluster_for(gpus: str, profiles: ClusterProfiles) -> Cluster:
    """Return the cluster that `--gpus` describes, checked against the profiles.

    Raises:
        InputError: no cluster can be read, or the profile was not measured on its GPUs.
    """
    own = [
        gpu_kind(profile.gpu_kind, capacity_bytes=profile.capacity_bytes, idle_bytes=profile.idle_bytes)
        for profile in profiles.by_kind.values()
    ]
    cluster, profile = cluster_from(gpus, own), profiles.main
    for gpu in cluster.gpus:
        if gpu.kind not in profiles.by_kind:
            raise InputError(
                f"profile {profile.name!r} was measured on {profile.gpu_kind}, but GPU {gpu.gpu_id} of cluster "
                f"{cluster.name!r} is of kind {gpu.kind}; give a cluster of {profile.gpu_kind} with --gpus, or a "
                f"profile of {gpu.kind} with --profile FILE"
            )
    return cluster


def _controller_settings(options: Options, profile: HardwareProfile, *, live: bool = False) -> ControllerSettings:
    """Return the controller's settings, but for its router.

    Raises:
        UnknownNameError: an unknown queue discipline or reaction to failures.
    """
    return ControllerSettings(
        timing=_timing(options, profile.timing),
        discipline=choice(QueueDiscipline, "queue", options.queue),
        max_wait_us=micros(options.max_wait_s),
        on_failure=choice(OnFailure, "--on-failure", options.on_failure),
        on_loss=choice(OnLoss, "--on-loss", options.on_loss),
        seed=options.seed,
        load_window=profile.load_window,
        refuse_beyond_context=refuses_long_requests(options, profile, live=live),
    )


def _timing(options: Options, measured: DispatchTiming) -> DispatchTiming:
    """Return the profile's timing, with what the user set or switched off."""
    given: dict[str, Micros] = {}
    for name, value, unit_s in (
        ("tick_us", options.tick_ms, 1e-3),
        ("after_arrival_us", options.after_arrival_ms, 1e-3),
        ("after_release_us", options.after_release_ms, 1e-3),
        ("registration_delay_us", options.registration_delay_s, 1.0),
    ):
        if value is not None:
            given[name] = micros(value * unit_s)
    return replace(DispatchTiming() if options.no_dispatch_overhead else measured, **given)


def _load_time(options: Options, profiles: ClusterProfiles) -> LoadTime:
    """Return how long engines load: as the user says, else as the profile of their GPUs does."""

    def load_time(plan: DeploymentPlan) -> Micros:
        if options.load_s is not None:
            return micros(options.load_s)
        return duration_micros(profiles.load_time_s(plan.model, plan.configuration, gib(max(plan.gpu_bytes))))

    return load_time


def _service_time_predictor(estimator: Estimator) -> ServiceTimePredictor:
    """Predict a request's service time from its prompt and the output length that the endpoint was planned for.

    The true output length is not known before a request has run.
    """
    cache: dict[tuple[int, int, int], Micros] = {}
    plans: dict[int, DeploymentPlan] = {}  # keeps those alive whose identity is part of a key

    def predict_service_time(deployment: Deployment, request: Request) -> Micros:
        plan, output_tokens = deployment.required_plan, deployment.endpoint.output_tokens
        key = (id(plan), request.prompt_tokens, output_tokens)
        if key not in cache:
            service = estimator.service(
                plan.model,
                plan.configuration,
                prompt_tokens=request.prompt_tokens,
                output_tokens=output_tokens,
                batch=1,
            )
            if len(cache) >= _MAX_CACHED:  # a live cluster may run for months
                cache.clear()
                plans.clear()
            cache[key] = duration_micros(service.latency_s)
            plans[id(plan)] = plan
        return cache[key]

    return predict_service_time


def _sample_us(workload: Workload, drain_us: Micros, gpus: int) -> Micros:
    """Return the interval between GPU samples: one second, or more in a long run or on a very large cluster."""
    end_us = int(workload.arrivals.arrival_us[-1]) + drain_us
    samples = min(_MAX_SAMPLES, max(1, _MAX_SAMPLES_OF_ALL_GPUS // gpus))
    return MICROS_PER_SECOND * max(1, math.ceil(end_us / MICROS_PER_SECOND / samples))
