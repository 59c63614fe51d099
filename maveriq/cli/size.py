"""`maveriq size`: the fewest or cheapest GPUs that serve a workload within its SLOs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import typer

from maveriq.cli.options import with_options
from maveriq.cli.output import echo
from maveriq.report.terminal import open_console
from maveriq.scenario.options import Options, option
from maveriq.sizing.size import SizeRequest, kinds_in, size_cluster
from maveriq.sizing.view import size_json, size_view
from maveriq.sweeps.run import LOCAL, make_pool

_SIZE, _OUTPUT = "Size", "Output"
_OPTIONS = [field.name for field in fields(Options) if field.name != "gpus"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeOptions:
    """What is looked for; options of `maveriq size`."""

    gpus: str = option("H100-SXM", "Kinds of GPU, separated by commas; each is sized by itself.", _SIZE)
    slo_ttft_ms: float | None = option(None, "Time to first token that a request must meet.", _SIZE)
    slo_tpot_ms: float | None = option(None, "Time per output token that a request must meet.", _SIZE)
    attainment: float = option(99.0, "Percentage of the requests that must meet the SLOs.", _SIZE)
    max_gpus: int = option(64, "The most GPUs to consider.", _SIZE)
    seeds: int = option(3, "Simulations of each size.", _SIZE)
    max_seeds: int = option(12, "The most simulations of a size that is near the target.", _SIZE)
    workers: int | None = option(None, "Processes at once.", _SIZE, shown="one a core")
    on: str = option(LOCAL, "Where: local, ray, or the address of a Ray cluster.", _SIZE)
    as_json: bool = option(False, "Print only JSON.", _OUTPUT, flags=("--json",))  # noqa: FBT003
    quiet: bool = option(False, "No progress.", _OUTPUT, flags=("--quiet", "-q"))  # noqa: FBT003


@with_options((Options, _OPTIONS), SizeOptions)
def size(options: Options, chosen: SizeOptions) -> None:
    """Find the fewest GPUs that serve a workload within its SLOs.

    Simulates clusters of growing size with several seeds each, until one size
    is sure to meet the SLOs and the one below it is not. Options of the workload
    and the policy are those of maveriq sim.
    """
    request = SizeRequest(
        options=options,
        kinds=kinds_in(chosen.gpus),
        attainment=chosen.attainment / 100,
        slo_ttft_ms=chosen.slo_ttft_ms,
        slo_tpot_ms=chosen.slo_tpot_ms,
        max_gpus=chosen.max_gpus,
        seeds=chosen.seeds,
        max_seeds=chosen.max_seeds,
    )
    with make_pool(chosen.on, chosen.workers) as pool, _progress(quiet=chosen.quiet or chosen.as_json) as watch:
        result = size_cluster(request, pool=pool, watch=watch)
    if chosen.as_json:
        typer.echo(json.dumps(size_json(result), indent=2, allow_nan=False))
    else:
        console = open_console()
        console.print(size_view(result, width=console.width))


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show on stderr which size is simulated: one changing line, or in a file a line each."""
    if quiet:
        yield lambda *_: None
        return
    console = open_console(stderr=True)
    if not console.is_terminal:
        yield lambda kind, gpus, seeds: echo(f"simulating {gpus} x {kind}, {seeds} seeds", err=True)
        return
    with console.status("simulating") as status:
        yield lambda kind, gpus, seeds: status.update(f"simulating {gpus} x {kind}, {seeds} seeds")
