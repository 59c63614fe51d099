"""`maveriq plan`: which configurations meet an intent, best first, without a trace."""

from __future__ import annotations

from typing import Annotated

import typer

_MAX_TOKENS = 10_000_000
_MAX_BATCH = 10_000


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model's name, or the path of a Hugging Face config.json.")
    ],
    *,
    intent: Annotated[str, typer.Option(help="min-cost, min-latency, min-memory, or min-gpu-cost.")] = "min-cost",
    slo_ms: Annotated[float | None, typer.Option(help="Latency of a whole request must be below this.")] = None,
    min_accuracy: Annotated[float, typer.Option(help="Least accuracy, in percent of the float16 model's.")] = 0.0,
    float16_only: Annotated[bool, typer.Option("--float16-only", help="No quantised weights.")] = False,
    gpus: Annotated[str, typer.Option(help="The cluster: 8xA6000, a TOML file, or local.")] = "8xA6000",
    prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=_MAX_TOKENS, help="Length of a typical prompt.", show_default="the profile's"),
    ] = None,
    output_tokens: Annotated[int, typer.Option(min=1, max=_MAX_TOKENS, help="Length of a typical output.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, max=_MAX_BATCH, help="Requests that an engine serves at once.")] = 1,
    estimator: Annotated[
        str | None, typer.Option(help="Estimator to plan with: calibrated or paper.", show_default="calibrated")
    ] = None,
    profile: Annotated[
        str, typer.Option(help="Hardware profile: a6000-short, a6000-long, or a TOML file.")
    ] = "a6000-short",
    top: Annotated[int, typer.Option(min=1, help="How many configurations to show.")] = 10,
    all_reasons: Annotated[bool, typer.Option("--explain", help="Name every configuration that was left out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone, with everything in it.")] = False,
) -> None:
    """Rank a model's configurations for an intent.

    The cluster is taken as empty. Shows what is estimated of each configuration,
    and why the rest was left out. Exits with 1 where none fits or meets the SLO;
    then --explain shows the rest.
    """
    from maveriq.cli.planning import PlanQuestion, answer

    answer(
        PlanQuestion(
            model=model,
            objective=intent,
            slo_ms=slo_ms,
            min_accuracy=min_accuracy,
            float16_only=float16_only,
            gpus=gpus,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            batch_size=batch_size,
            estimator=estimator,
            profile=profile,
        ),
        top=top,
        all_reasons=all_reasons,
        as_json=as_json,
    )
