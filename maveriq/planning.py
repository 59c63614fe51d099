"""Rankings of a model's configurations for an intent, on an empty cluster: what `maveriq plan` answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maveriq.errors import InputError
from maveriq.scenario.options import INTENTS, check_ranges, convert_types, option

if TYPE_CHECKING:
    from maveriq.domain.cluster import Cluster
    from maveriq.domain.deployments import EndpointSpec
    from maveriq.domain.models import ModelSpec
    from maveriq.estimate.cluster_profiles import ClusterProfiles
    from maveriq.estimate.estimator import Estimator
    from maveriq.estimate.hardware_profile import HardwareProfile
    from maveriq.policy.configuration import Ranking

_PANEL = "Model"
_MAX_TOKENS, _MAX_BATCH = 10_000_000, 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """The options of `maveriq plan`.

    Raises:
        InputError: a value of another type, or a number out of range.
    """

    intent: str = option("min-cost", "min-cost, min-latency, min-memory, or min-gpu-cost.", _PANEL, choices=INTENTS)
    slo_ms: float | None = option(None, "Upper limit of a whole request's latency.", _PANEL)
    slo_ttft_ms: float | None = option(None, "Upper limit of the time to first token.", _PANEL)
    slo_tpot_ms: float | None = option(None, "Upper limit of the time per output token.", _PANEL)
    min_accuracy: float = option(0.0, "Least accuracy, in percent of the float16 model's.", _PANEL)
    accuracy: str | None = option(
        None,
        "Accuracy of models whose profile does not know it: a CSV file of model, weights, kv, percent.",
        _PANEL,
        shown="the profile's",
    )
    float16_only: bool = option(False, "No quantised weights.", _PANEL)  # noqa: FBT003
    gpus: str = option("8xA6000", "The cluster: 8xA6000, a TOML file, or local.", _PANEL, choices=("8xA6000", "local"))
    prompt_tokens: int | None = option(
        None, "Length of a typical prompt.", _PANEL, shown="the profile's", minimum=1, maximum=_MAX_TOKENS
    )
    output_tokens: int = option(20, "Length of a typical output.", _PANEL, minimum=1, maximum=_MAX_TOKENS)
    batch_size: int = option(
        1, "Largest batch of an engine; with --engine, requests in flight.", _PANEL, minimum=1, maximum=_MAX_BATCH
    )
    estimator: str | None = option(
        None,
        "The estimator: calibrated, paper, measured, blended, or physics.",
        _PANEL,
        shown="calibrated",
        choices=("calibrated", "paper", "measured", "blended", "physics"),
    )
    engine: str | None = option(
        None,
        "Estimate continuous batching of vllm, trtllm, sglang, or of a version, vllm-0.23.0.",
        _PANEL,
        shown="vllm, one batch at a time",
        choices=("vllm", "trtllm", "sglang"),
    )
    usd_per_hour: float | None = option(
        None, "Price of a GPU and hour in US dollars.", _PANEL, shown="the cluster's, or list prices", minimum=0,
        maximum=1e6,
    )  # fmt: skip
    profile: str = option(
        "a6000-short",
        "Hardware profile: a6000-short, a6000-long, a TOML file, or what maveriq profile wrote.",
        _PANEL,
        choices=("a6000-short", "a6000-long"),
    )

    def __post_init__(self) -> None:
        convert_types(self)
        check_ranges(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedPlan:
    """The configurations of a model, ranked for an intent; `failure` says why none meets it, "" where one does."""

    endpoint: EndpointSpec
    ranking: Ranking
    cluster: Cluster
    estimator: str
    failure: str
    note: str

    @property
    def summary(self) -> str:
        """One line with the best configuration and its figures; "" where there is none."""
        from maveriq.report.plans import summary_line

        return summary_line(self.endpoint, self.ranking, self.cluster) if self.ranking.candidates else ""

    def to_dict(self) -> dict[str, Any]:
        """Return the ranking in plain values, as `maveriq plan --json` prints it."""
        from maveriq.report.plans import ranking_json

        return {"estimator": self.estimator, **ranking_json(self.endpoint, self.ranking, self.cluster)}


def rank_configurations(model: str | Path, options: PlanOptions, *, estimator: Any = None) -> RankedPlan:
    """Return the ranking behind `plan`.

    Args:
        model: a model's name, or the path of a Hugging Face config.json.
        options: the intent and the cluster.
        estimator: an estimator object to plan with instead of the one that the options name.

    Raises:
        InputError: an option that cannot be used, or a model without a profile.
    """
    from maveriq.domain.models import load_model
    from maveriq.estimate.cluster_estimator import estimator_names, notes_on_defaults
    from maveriq.estimate.cluster_profiles import profiles_for
    from maveriq.exec.local_machine import local_cluster
    from maveriq.scenario.cluster_notes import note_on_cluster

    profiles = profiles_for(options.profile, options.gpus, options.accuracy)
    cluster = local_cluster(options.gpus, profiles)
    if options.usd_per_hour is not None:
        cluster = cluster.at_price(options.usd_per_hour)
    spec = load_model(str(model))
    if estimator is None:
        names = estimator_names(options.estimator, profiles, [spec])
        reasons = [_why_unknown(spec, profiles.by_kind[kind], name) for kind, name in names.items()]
        if all(reasons):
            raise InputError(f"model {spec.name!r}{reasons[0]}")
    endpoint = _endpoint(spec, options, profiles.main)
    planner = estimator or _planner(spec, cluster, profiles, options)
    ranking = _rank(endpoint, cluster, profiles, planner, in_ms=options.slo_ms is not None)
    accuracy = _note_on_accuracy(endpoint, ranking)
    notes = (
        *note_on_cluster(cluster),
        *(() if estimator or options.estimator else notes_on_defaults(profiles, [spec])),
        *accuracy,
    )
    failure = ranking.note
    if not ranking.candidates:
        more = () if estimator else _note_on_more_gpus(endpoint, ranking, cluster, profiles, options)
        failure = "; ".join((ranking.why_empty(), *more, *accuracy))
    return RankedPlan(
        endpoint=endpoint,
        ranking=ranking,
        cluster=cluster,
        estimator=planner.name,
        failure=failure,
        note="\n".join(notes),
    )


def _endpoint(model: ModelSpec, options: PlanOptions, profile: HardwareProfile) -> EndpointSpec:
    from maveriq.domain.deployments import EndpointSpec, Intent, Objective

    endpoint = EndpointSpec(
        endpoint_id=1,
        model=model,
        intent=Intent(
            objective=Objective.named(options.intent),
            slo_s=_seconds(options.slo_ms),
            slo_ttft_s=_seconds(options.slo_ttft_ms),
            slo_tpot_s=_seconds(options.slo_tpot_ms),
            min_accuracy=options.min_accuracy,
            float16_only=options.float16_only,
        ),
        requested_us=0,
        prompt_tokens=profile.prompt_tokens if options.prompt_tokens is None else options.prompt_tokens,
        output_tokens=options.output_tokens,
        batch_size=options.batch_size,
    )
    too_long = model.why_too_long(endpoint.prompt_tokens + endpoint.output_tokens)
    if too_long is not None:
        raise InputError(f"{too_long}; plan for shorter prompts or outputs")
    return endpoint


def _seconds(slo_ms: float | None) -> float | None:
    return None if slo_ms is None else slo_ms / 1e3


def _planner(model: ModelSpec, cluster: Cluster, profiles: ClusterProfiles, options: PlanOptions) -> Estimator:
    from maveriq.estimate.cluster_estimator import estimator_for
    from maveriq.estimate.engine_presets import engine_preset
    from maveriq.estimate.registry import BLENDED, PHYSICS

    engine = None if options.engine is None else engine_preset(options.engine)
    planner = estimator_for(cluster, profiles, options.estimator, engine, [model])
    if engine is not None and not {BLENDED, PHYSICS} & {*planner.name.split("+")}:
        raise InputError(
            f"--engine {options.engine}: what estimator {planner.name!r} knows was measured with one engine; leave "
            "--engine out, or add --estimator physics"
        )
    return planner


def _rank(
    endpoint: EndpointSpec, cluster: Cluster, profiles: ClusterProfiles, planner: Estimator, *, in_ms: bool
) -> Ranking:
    from maveriq.domain.cluster import ClusterState
    from maveriq.policy.configuration import rank

    view = ClusterState(cluster).view([0.0] * len(cluster))
    return rank(
        endpoint,
        view,
        planner,
        profiles.accuracy,
        cost=profiles.min_cost,
        evidence=profiles.measured_ratio,
        in_ms=in_ms,
    )


def _note_on_accuracy(endpoint: EndpointSpec, ranking: Ranking) -> tuple[str, ...]:
    """Return a note where the ranking would need an accuracy that was never measured."""
    from maveriq.policy.configuration import NEVER_MEASURED

    name, table = endpoint.model.name, "--accuracy FILE takes a table"
    if endpoint.intent.min_accuracy > 0:
        unknown = any(rejected.reason == NEVER_MEASURED for rejected in ranking.rejected)
        return (f"the accuracy of {name} was never measured in all formats; {table}",) if unknown else ()
    if ranking.candidates and ranking.candidates[0].accuracy is None:
        return (f"what the weights' format costs {name} in accuracy is not known; {table}, for --min-accuracy",)
    return ()


_MOST_GPUS = 1024  # the search ends here


def _note_on_more_gpus(
    endpoint: EndpointSpec, ranking: Ranking, cluster: Cluster, profiles: ClusterProfiles, options: PlanOptions
) -> tuple[str, ...]:
    """Return how many GPUs of the kind a model would need that does not fit; nothing where that is not the reason."""
    from maveriq.domain.cluster import Cluster
    from maveriq.domain.gpu_kinds import gpu_sheets
    from maveriq.policy.configuration import NO_MEMORY, NO_ROOM

    too_large = any(rejected.reason in (NO_MEMORY, NO_ROOM) for rejected in ranking.rejected)
    if not too_large or len(cluster.kinds) > 1 or cluster.kinds[0] not in gpu_sheets():
        return ()
    emptiest = max(cluster.gpus, key=lambda gpu: gpu.capacity_bytes - gpu.idle_bytes)
    node_gpus = cluster.largest_node(emptiest.kind)
    if not cluster.has_network:
        node_gpus = max(node_gpus, gpu_sheets()[emptiest.kind].gpus_per_node)
    count = 2 * len(cluster)
    while count <= _MOST_GPUS:
        larger = Cluster(
            name=cluster.name,
            gpus=tuple(replace(emptiest, gpu_id=number, node=number // node_gpus) for number in range(count)),
            nodes=(cluster.node(emptiest.node),) * -(-count // node_gpus),
        )
        found = _rank(
            endpoint, larger, profiles, _planner(endpoint.model, larger, profiles, options), in_ms=False
        ).candidates
        if found:
            fewest = min(candidate.configuration.gpus for candidate in found)
            return (f"it would take {fewest} {cluster.kinds[0]}",)
        count *= 2
    return ()


def _why_unknown(model: ModelSpec, profile: HardwareProfile, estimator: str) -> str | None:
    """Return why no configuration of a model can be estimated on a kind of GPU, None if some may."""
    from maveriq.estimate.registry import BLENDED, MEASURED, PHYSICS

    other = profile.why_other_model(model)
    if other is not None:
        return f": {other}"
    # Estimators with a table of their own report themselves which models they know.
    known = profile.fingerprints.models()
    if estimator in (MEASURED, BLENDED, PHYSICS) or model.name in known:
        return None
    return (
        f" has no fingerprint in profile {profile.name!r} (it has {', '.join(sorted(known)) or 'none'}); measure one "
        "and give it with --profile FILE, or estimate it from its shape with --estimator physics"
    )
