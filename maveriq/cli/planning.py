"""The work behind `maveriq plan`."""

from __future__ import annotations

import json
from dataclasses import dataclass

import typer
from rich.console import Console

from maveriq.cli.local_gpus import cluster_here
from maveriq.domain.cluster import ClusterState
from maveriq.domain.deployments import EndpointSpec, Intent, Objective
from maveriq.domain.models import load_model
from maveriq.errors import InputError, MaveriqError
from maveriq.estimate.hardware_profile import load_profile
from maveriq.estimate.registry import MEASURED, default_estimator, make_estimator, note_on_default
from maveriq.policy.configuration import rank
from maveriq.report.plans import ranking_json, ranking_table, rejected_table


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanQuestion:
    """What a user asks of `maveriq plan`; fields as its options."""

    model: str
    objective: str
    slo_ms: float | None
    min_accuracy: float
    float16_only: bool
    gpus: str
    prompt_tokens: int | None
    output_tokens: int
    batch_size: int
    estimator: str | None
    profile: str


def answer(question: PlanQuestion, *, top: int, all_reasons: bool, as_json: bool) -> None:
    """Print the ranking; where no configuration meets the intent only if all reasons are asked for.

    Raises:
        InputError: an option that cannot be used, or a model without a profile.
        MaveriqError: no configuration meets the intent.
    """
    profile = load_profile(question.profile)
    cluster = cluster_here(question.gpus, profile)
    model = load_model(question.model)
    estimator = question.estimator or default_estimator(profile)
    # An estimator that goes by a table of its own says itself which models it knows.
    if estimator != MEASURED and model.name not in profile.fingerprints.models():
        raise InputError(
            f"model {model.name!r} has no fingerprint in profile {profile.name!r} (it has "
            f"{', '.join(sorted(profile.fingerprints.models()))}); measure one and give it with --profile FILE"
        )
    endpoint = EndpointSpec(
        endpoint_id=1,
        model=model,
        intent=Intent(
            objective=Objective.named(question.objective),
            slo_s=None if question.slo_ms is None else question.slo_ms / 1e3,
            min_accuracy=question.min_accuracy,
            float16_only=question.float16_only,
        ),
        requested_us=0,
        prompt_tokens=profile.prompt_tokens if question.prompt_tokens is None else question.prompt_tokens,
        output_tokens=question.output_tokens,
        batch_size=question.batch_size,
    )
    view = ClusterState(cluster).view([0.0] * len(cluster))
    ranking = rank(endpoint, view, make_estimator(estimator, profile), profile.accuracy)
    failure = ranking.note if ranking.candidates else ranking.why_empty()
    if failure and not all_reasons:
        raise MaveriqError(f"{model.name}: {failure}; --explain names every configuration")
    if as_json:
        typer.echo(
            json.dumps({"estimator": estimator, **ranking_json(endpoint, ranking, cluster)}, indent=2, allow_nan=False)
        )
    else:
        console = Console()
        if ranking.candidates:
            console.print(ranking_table(endpoint, ranking, cluster, top=top, width=console.width))
        console.print(rejected_table(ranking, every=all_reasons))
        note = None if question.estimator else note_on_default(profile)
        if note:
            console.print(note, highlight=False, markup=False)
    if failure:
        raise MaveriqError(f"{model.name}: {failure}")
