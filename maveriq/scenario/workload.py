"""The workload that options describe."""

from __future__ import annotations

from maveriq.domain.deployments import Intent, Objective
from maveriq.errors import InputError
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.scenario.options import Options
from maveriq.scenario.slo_bases import slo_bases
from maveriq.workload.build import build_workload
from maveriq.workload.model_sets import load_model_set
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
    )


def _limit(options: Options) -> int | None:
    """Return how many requests there are at most."""
    if options.num_prompts is None:
        return options.limit
    if options.limit not in (None, options.num_prompts):
        raise InputError("--limit and --num-prompts are the same; give one of them")
    return options.num_prompts
