"""Static placement: AlpaServe and AlpaServe* search a placement for the expected demand before the run.

The honest default knows the run's own requests, SLOs and names, and profiles of the whole
generation from maveriq's estimator. `as published` has what the published search had instead:
its table (prefill and weights alone), 48 GiB of each GPU, the trace twice in a row, and model
names that are off by one (docs/alpaserve.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from maveriq.domain.cluster import Cluster
from maveriq.domain.requests import DemandForecast
from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.estimator import Estimator
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.policy.alpaserve.policy import StaticPlacementPolicy, described
from maveriq.policy.alpaserve.problem import (
    ModelProfile,
    PlacementPolicy,
    SearchSettings,
    StarRule,
    problem_for_cluster,
)
from maveriq.policy.alpaserve.profiles import profiles_from_estimator, published_profiles_of
from maveriq.policy.alpaserve.search import search
from maveriq.scenario.defaults import resolved
from maveriq.scenario.options import Options
from maveriq.scenario.workload import workload_for
from maveriq.units import Bytes, bytes_from_gib
from maveriq.workload.forecast import forecast_of, published_forecast
from maveriq.workload.model_sets import load_model_set
from maveriq.workload.requests import Workload
from maveriq.workload.schedules import Schedule
from maveriq.workload.traces import SyntheticLoad, load_trace

STATIC_POLICIES = (PlacementPolicy.ALPASERVE.value, PlacementPolicy.ALPASERVE_STAR.value)
"""The names of the policies with static placement."""

_DEFAULT_SLO_SCALE = 5.0
"""For a run without SLOs, since the search needs one; the published driver's default."""

_MAX_TP = 8
"""Of the published runs; AlpaServe's own default is 4."""

_PUBLISHED_MEMORY_BYTES: Bytes = bytes_from_gib(48)
_PROFILES = ("maveriq", "published")


def search_static_placement(
    options: Options, profile: HardwareProfile, cluster: Cluster, estimator: Estimator, workload: Workload
) -> tuple[StaticPlacementPolicy, tuple[str, ...]]:
    """Search the placement, and return it as a policy with notes for a reader of the results.

    Raises:
        InputError: options that do not match the trace, GPUs that differ, a model without profile.
    """
    published, name = options.alpaserve_as_published, resolved(options.policy)
    if workload.reacts:
        raise InputError(
            f"policy {name!r} plans for the times of arrivals, which a closed loop and turns of conversations do not "
            "have before the run; give another --policy, or an open loop"
        )
    if len(cluster.kinds) > 1:
        raise InputError(
            f"cluster {cluster.name!r} has {', '.join(cluster.kinds)}, and {name} places models on GPUs of one kind; "
            "use another policy, or such a cluster"
        )
    profiles = _profiles(options, cluster, estimator, workload)
    forecast = _published_forecast(options, profile, workload) if published else _forecast(options, profile, workload)
    solution = search(
        problem_for_cluster(forecast, cluster, profiles, memory_bytes=_PUBLISHED_MEMORY_BYTES if published else None),
        SearchSettings(policy=PlacementPolicy(name), max_tp=_MAX_TP, star_rule=_star_rule(options)),
    )
    names = [f"{endpoint.endpoint_id}:{endpoint.model.name}" for endpoint in workload.endpoints]
    notes = [f"{name}: {described(solution, names)}"]
    if published:
        notes.append(
            f"{name} as published: each model is placed for the requests of the one before it, by a table of "
            "prefill times and weights; this is a defect of the published comparison, kept for the record"
        )
    return StaticPlacementPolicy(name=name, solution=solution, profiles=profiles), tuple(notes)


def _profiles(options: Options, cluster: Cluster, estimator: Estimator, workload: Workload) -> Sequence[ModelProfile]:
    if options.alpaserve_profile not in _PROFILES:
        raise UnknownNameError("AlpaServe profile", options.alpaserve_profile, _PROFILES)
    models = [endpoint.model for endpoint in workload.endpoints]
    if options.alpaserve_as_published or options.alpaserve_profile == "published":
        return published_profiles_of([model.name for model in models])
    first = workload.endpoints[0]
    return profiles_from_estimator(
        models,
        estimator,
        gpus=len(cluster),
        prompt_tokens=first.prompt_tokens,
        output_tokens=first.output_tokens,
        batch_size=options.batch_size,
    )


def _forecast(options: Options, profile: HardwareProfile, workload: Workload) -> DemandForecast:
    """Return the run's own requests; where they have no SLO, under the default one."""
    arrivals = workload.arrivals
    if not arrivals.slo_us.any():
        arrivals = workload_for(options, profile, slo_scale=_DEFAULT_SLO_SCALE).arrivals
    return forecast_of(arrivals, len(workload.endpoints))


def _published_forecast(options: Options, profile: HardwareProfile, workload: Workload) -> DemandForecast:
    trace, source = load_trace(options.trace), workload.source
    if source is None or source.options.get("arrivals") != "published" or isinstance(trace, (SyntheticLoad, Schedule)):
        raise InputError(
            f"--alpaserve-as-published needs published arrivals, which {trace.name!r} does not have; give code or "
            "conversation, or --arrivals published with an Azure trace"
        )
    models = load_model_set(options.models)
    tokens = workload.endpoints[0].output_tokens
    slo_scale = options.slo_scale or _DEFAULT_SLO_SCALE

    def slo_s(model_name: str) -> float:
        base_s = profile.slo_s(model_name, tokens)
        if base_s is None:
            raise InputError(f"model {model_name!r} has no measured latency to scale an SLO from; AlpaServe needs one")
        return slo_scale * base_s

    return published_forecast(
        trace.requests_per_minute,
        models,
        scale=source.options["scale"],
        slo_s=slo_s,
        name_offset=1,
        seed=options.seed,
    )


def _star_rule(options: Options) -> StarRule:
    try:
        return StarRule(options.alpaserve_star_rule.upper())
    except ValueError:
        raise UnknownNameError(
            "AlpaServe* rule", options.alpaserve_star_rule, [rule.value for rule in StarRule]
        ) from None
