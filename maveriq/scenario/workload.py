"""The workload that options describe."""

from __future__ import annotations

from dataclasses import replace

from maveriq.domain.deployments import Batching, EndpointSpec, Intent, Objective
from maveriq.errors import InputError
from maveriq.estimate.cluster_profiles import ClusterProfiles
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.scenario.options import Options
from maveriq.scenario.slo_bases import slo_bases
from maveriq.units import gib
from maveriq.workload.build import build_workload, memory_share
from maveriq.workload.model_sets import ModelEntry, load_model_set
from maveriq.workload.options import WorkloadOptions
from maveriq.workload.requests import Workload


def workload_for(options: Options, profile: HardwareProfile, *, slo_scale: float) -> Workload:
    """Return the workload that options describe, under an SLO scale.

    Raises:
        InputError: as `build_workload`.
    """
    return build_workload(
        WorkloadOptions(
            trace=options.trace,
            scale=options.scale,
            arrivals=options.arrivals,
            rate=options.rate,
            duration_s=options.duration_s,
            limit=_limit(options),
            concurrency=options.concurrency,
            think_s=options.think_s,
            turns=options.turns,
            prefix_tokens=options.prefix_tokens,
            prefixes=options.prefixes,
            models=options.models,
            prompt_tokens=options.prompt_tokens,
            output_tokens=options.output_tokens,
            slo_scale=slo_scale,
            seed=options.seed,
            poisson_as_published=options.poisson_as_published,
        ),
        intent=Intent(
            objective=Objective.named(options.intent),
            min_accuracy=options.min_accuracy,
            float16_only=options.float16_only,
        ),
        slo_of=slo_bases(profile, (entry.model for entry in load_model_set(options.models).entries)),
        batch_size=options.batch_size,
        gpu_memory_gib=gib(profile.capacity_bytes),
    )


def _limit(options: Options) -> int | None:
    """Return how many requests there are at most."""
    if options.num_prompts is None:
        return options.limit
    if options.limit not in (None, options.num_prompts):
        raise InputError("--limit and --num-prompts are the same; give one of them")
    return options.num_prompts


def with_memory_shares(workload: Workload, models: str, profiles: ClusterProfiles) -> Workload:
    """Return the workload with the memory that its engines take on each kind of GPU, in a cluster of several kinds.

    Args:
        workload: whose endpoints are in the order of the model set.
        models: the model set.
        profiles: of the kinds.

    Raises:
        InputError: as `load_model_set`.
    """

    def with_shares(endpoint: EndpointSpec, entry: ModelEntry) -> EndpointSpec:
        if endpoint.memory_share is None:
            return endpoint
        found = {kind: memory_share(entry, gib(of.capacity_bytes)) for kind, of in profiles.by_kind.items()}
        return replace(endpoint, memory_shares=tuple((kind, share) for kind, share in found.items() if share))

    if len(profiles.by_kind) == 1:
        return workload
    pairs = zip(workload.endpoints, load_model_set(models).entries, strict=True)
    return replace(workload, endpoints=tuple(with_shares(endpoint, entry) for endpoint, entry in pairs))


def with_token_slos(workload: Workload, *, slo_ttft_s: float | None, slo_tpot_s: float | None) -> Workload:
    """Return the workload with the run's SLOs on tokens as those of its continuous engines, unless they have their own.

    Policies choose continuous engines by these SLOs. For exclusive ones they only say what counts as goodput.
    """

    def with_slos(endpoint: EndpointSpec) -> EndpointSpec:
        intent = endpoint.intent
        if endpoint.batching is Batching.EXCLUSIVE:
            return endpoint
        intent = replace(
            intent,
            slo_ttft_s=slo_ttft_s if intent.slo_ttft_s is None else intent.slo_ttft_s,
            slo_tpot_s=slo_tpot_s if intent.slo_tpot_s is None else intent.slo_tpot_s,
        )
        return replace(endpoint, intent=intent)

    if slo_ttft_s is None and slo_tpot_s is None:
        return workload
    return replace(workload, endpoints=tuple(map(with_slos, workload.endpoints)))
