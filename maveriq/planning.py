"""Rankings of a model's configurations for an intent, on an empty cluster: what `maveriq plan` answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maveriq.errors import InputError
from maveriq.scenario.options import INTENTS, check_ranges, convert_types, option

if TYPE_CHECKING:
    from maveriq.domain.cluster import Cluster
    from maveriq.domain.deployments import EndpointSpec
    from maveriq.domain.models import ModelSpec
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
    min_accuracy: float = option(0.0, "Least accuracy, in percent of the float16 model's.", _PANEL)
    float16_only: bool = option(False, "No quantised weights.", _PANEL)  # noqa: FBT003
    gpus: str = option("8xA6000", "The cluster: 8xA6000, a TOML file, or local.", _PANEL, choices=("8xA6000", "local"))
    prompt_tokens: int | None = option(
        None, "Length of a typical prompt.", _PANEL, shown="the profile's", minimum=1, maximum=_MAX_TOKENS
    )
    output_tokens: int = option(20, "Length of a typical output.", _PANEL, minimum=1, maximum=_MAX_TOKENS)
    batch_size: int = option(1, "Largest batch of an engine.", _PANEL, minimum=1, maximum=_MAX_BATCH)
    estimator: str | None = option(
        None,
        "The estimator: calibrated, paper, measured, or physics.",
        _PANEL,
        shown="calibrated",
        choices=("calibrated", "paper", "measured", "physics"),
    )
    profile: str = option(
        "a6000-short",
        "Hardware profile: a6000-short, a6000-long, or a TOML file.",
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
    from maveriq.domain.cluster import ClusterState
    from maveriq.domain.deployments import EndpointSpec, Intent, Objective
    from maveriq.domain.models import load_model
    from maveriq.estimate.cluster_estimator import estimator_for, notes_on_defaults
    from maveriq.estimate.cluster_profiles import profiles_for
    from maveriq.exec.local_machine import local_cluster
    from maveriq.policy.configuration import rank
    from maveriq.scenario.cluster_notes import note_on_cluster

    profiles = profiles_for(options.profile, options.gpus)
    profile, cluster = profiles.main, local_cluster(options.gpus, profiles)
    spec = load_model(str(model))
    if estimator is None:
        reasons = [_why_unknown(spec, profile, options.estimator) for profile in profiles.by_kind.values()]
        if all(reasons):
            raise InputError(f"model {spec.name!r}{reasons[0]}")
    endpoint = EndpointSpec(
        endpoint_id=1,
        model=spec,
        intent=Intent(
            objective=Objective.named(options.intent),
            slo_s=None if options.slo_ms is None else options.slo_ms / 1e3,
            min_accuracy=options.min_accuracy,
            float16_only=options.float16_only,
        ),
        requested_us=0,
        prompt_tokens=profile.prompt_tokens if options.prompt_tokens is None else options.prompt_tokens,
        output_tokens=options.output_tokens,
        batch_size=options.batch_size,
    )
    too_long = spec.why_too_long(endpoint.prompt_tokens + endpoint.output_tokens)
    if too_long is not None:
        raise InputError(f"{too_long}; plan for shorter prompts or outputs")
    view = ClusterState(cluster).view([0.0] * len(cluster))
    planner = estimator or estimator_for(cluster, profiles, options.estimator)
    ranking = rank(
        endpoint, view, planner, profiles.accuracy, evidence=profiles.measured_ratio, in_ms=options.slo_ms is not None
    )
    notes = (*note_on_cluster(cluster), *(() if estimator or options.estimator else notes_on_defaults(profiles)))
    return RankedPlan(
        endpoint=endpoint,
        ranking=ranking,
        cluster=cluster,
        estimator=planner.name,
        failure=ranking.note if ranking.candidates else ranking.why_empty(),
        note="\n".join(notes),
    )


def _why_unknown(model: ModelSpec, profile: HardwareProfile, estimator: str | None) -> str | None:
    """Return why no configuration of a model can be estimated on a kind of GPU, None if some may."""
    from maveriq.estimate.registry import MEASURED, PHYSICS, default_estimator

    other = profile.why_other_model(model)
    if other is not None:
        return f": {other}"
    # Estimators with a table of their own report themselves which models they know.
    name, known = estimator or default_estimator(profile), profile.fingerprints.models()
    if name in (MEASURED, PHYSICS) or model.name in known:
        return None
    return (
        f" has no fingerprint in profile {profile.name!r} (it has {', '.join(sorted(known))}); measure one and give it "
        "with --profile FILE"
    )
