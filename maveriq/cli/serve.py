"""`maveriq serve`: keep a cluster up for users over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maveriq.cli.flags import with_options
from maveriq.cli.shared_flags import Backend, Hang, MostFailures, Real, StartTimeout, TimeScale
from maveriq.scenario.options import Options

_HTTP, _LIMITS, _ENGINES = "HTTP", "Limits", "Engines"
_MOST = 1_000_000

CLUSTER_OPTIONS = (
    "gpus", "profile", "policy", "packing_threshold", "queue", "max_wait_s", "router", "on_failure", "estimator",
    "service_times", "load_s", "seed",
)  # fmt: skip
"""The options of a run that a service has too."""


@with_options(Options, only=CLUSTER_OPTIONS)
def serve(
    options: Options,
    *,
    backend: Backend = None,
    real: Real = False,
    time_scale: TimeScale = 1.0,
    start_timeout_s: StartTimeout = 900.0,
    hang_timeout_s: Hang = 30.0,
    max_restarts: MostFailures = 5,
    models_folder: Annotated[
        Path | None, typer.Option(help="Models may be read from here as well.", rich_help_panel=_ENGINES)
    ] = None,
    state: Annotated[
        Path, typer.Option(help="What survives a restart; engines' logs lie beside it.", rich_help_panel=_ENGINES)
    ] = Path("maveriq-serve.db"),
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's needs a token.", rich_help_panel=_HTTP)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.", rich_help_panel=_HTTP)] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the token; or MAVERIQ_TOKEN in the environment.", rich_help_panel=_HTTP),
    ] = None,
    max_requests: Annotated[
        int, typer.Option(min=1, max=_MOST, help="Requests in flight; more get 429.", rich_help_panel=_LIMITS)
    ] = 256,
    max_body_kib: Annotated[
        int, typer.Option(min=1, max=_MOST, help="Size of a body; more gets 413.", rich_help_panel=_LIMITS)
    ] = 1024,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=1, max=_MOST, help="Tokens of a prompt.", rich_help_panel=_LIMITS)
    ] = 32_768,
    max_output_tokens: Annotated[
        int, typer.Option(min=1, max=_MOST, help="Tokens of an output.", rich_help_panel=_LIMITS)
    ] = 4_096,
    grace_period_s: Annotated[
        float,
        typer.Option(
            min=0.001, max=1e6, help="Time for running requests to finish at shutdown.", rich_help_panel=_LIMITS
        ),
    ] = 30.0,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Say nothing but errors.", rich_help_panel=_HTTP)
    ] = False,
) -> None:
    """Serve many models on one cluster over HTTP.

    OpenAI's API for what is deployed, /endpoints to deploy by intent, /metrics
    for Prometheus. Listens on this machine alone unless there is a token.
    Ctrl-C or SIGTERM ends it in order. Endpoints come back with the next start.
    """
    from maveriq.cli.engine_site import Engines
    from maveriq.cli.serving import Serving, run_service

    run_service(
        options,
        Engines(
            backend=backend,
            real=real,
            time_scale=time_scale,
            start_timeout_s=start_timeout_s,
            hang_timeout_s=hang_timeout_s,
            max_restarts=max_restarts,
        ),
        Serving(
            models_folder=models_folder,
            state=state,
            host=host,
            port=port,
            token_file=token_file,
            max_requests=max_requests,
            max_body_kib=max_body_kib,
            max_prompt_tokens=max_prompt_tokens,
            max_output_tokens=max_output_tokens,
            grace_period_s=grace_period_s,
            quiet=quiet,
        ),
    )
