"""`maveriq compare`: shows how far runs are from the run that they are measured by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from maveriq import api
from maveriq.cli.options import JsonFlag, OverwriteFlag
from maveriq.errors import InputError, MaveriqError
from maveriq.report.compare import Check, Comparison, check, parse_tolerances
from maveriq.report.compare_many import ManyComparison, many_view
from maveriq.report.compare_plot import POINTS, check_plot, write_plot
from maveriq.report.compare_view import checks_table, comparison_view, matching_line
from maveriq.report.run_labels import short_labels
from maveriq.report.terminal import open_console
from maveriq.report.text_plot import dots_across
from maveriq.runs import load_run


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... REFERENCE",
            help="Folders of runs or names of recorded runs; each is compared with the last.",
        ),
    ],
    *,
    tolerance: Annotated[
        str | None,
        typer.Option(
            metavar="mean=10%,slo=3pt,...",
            help="Largest errors allowed of the whole run; exit code 1 where one is exceeded.",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png|svg", help="Draw both runs into a file.")] = None,
    overwrite: OverwriteFlag = False,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The folder of recorded runs.", show_default="MAVERIQ_DATA"),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show how far runs are from the run that they are measured by.

    Signed errors of the whole run and by model: latency, queueing delay,
    service time, SLOs, throughput, cost; plans side by side; latency
    distributions and queues over one another. Of more than two runs, the
    figures of each and the errors against the last.

    Tolerances in %: mean, p50, p95, p99, the same with queue- or service-,
    throughput, cost, gpu-hours, request (median error of a request); in pt:
    slo, slo-all, ks.
    """
    if len(runs) < 2:
        raise InputError(f"compare takes at least two runs, not only {runs[0]!r}; name the run to measure it by last")
    tolerances = parse_tolerances(tolerance) if tolerance is not None else ()
    if plot is not None:
        check_plot(plot, overwrite=overwrite)
        if len(runs) > 2:
            raise InputError(f"--plot draws two runs, not {len(runs)}; leave it out, or name two")
    loaded = [load_run(name, data=data) for name in runs]
    compared = api.compare_named(loaded, runs)
    comparisons = compared.comparisons if isinstance(compared, ManyComparison) else (compared,)
    checks = [check(comparison, tolerances) for comparison in comparisons]
    if isinstance(compared, ManyComparison):
        _show_many(compared, runs, checks, as_json=as_json)
    else:
        _show_two(compared, runs, checks[0], plot=plot, overwrite=overwrite, as_json=as_json)
    missed = [
        result.name if len(runs) == 2 else f"{result.name} of {name}"
        for name, results in zip(runs, checks, strict=False)
        for result in results
        if not result.met
    ]
    if missed:
        raise MaveriqError(f"out of tolerance: {', '.join(missed)}")


def _show_two(
    comparison: Comparison,
    runs: Sequence[str],
    checks: Sequence[Check],
    *,
    plot: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    if plot is not None:
        title = " against ".join(short_labels(comparison.labels))
        write_plot(plot, comparison, comparison.curves(POINTS), title=title, overwrite=overwrite)
    if as_json:
        _print_json({"sim": runs[0], "real": runs[1], **_checked(checks), **_matched(comparison)})
        return
    console = open_console()
    _print_runs(console, runs, [label.kind for label in comparison.labels])
    curves = comparison.curves(dots_across(console.width))
    ascii_only = console.options.ascii_only
    console.print(comparison_view(comparison, curves, checks, width=console.width, ascii_only=ascii_only))
    if plot is not None:
        console.print(f"plot: {plot}", markup=False, highlight=False, soft_wrap=True)


def _show_many(many: ManyComparison, runs: Sequence[str], checks: Sequence[Sequence[Check]], *, as_json: bool) -> None:
    if as_json:
        comparisons = [
            {"run": name, **_checked(found), **_matched(comparison)}
            for name, comparison, found in zip(runs[:-1], many.comparisons, checks, strict=True)
        ]
        _print_json({**many.to_dict(), "reference": runs[-1], "comparisons": comparisons})
        return
    console = open_console()
    _print_runs(console, runs, [label.kind for label in many.labels])
    console.print(many_view(many, width=console.width))
    for name, found in zip(short_labels(many.labels), checks, strict=False):
        if found:
            console.print(f"{name}:", markup=False, highlight=False)
            console.print(checks_table(found))


def _print_runs(console: Console, runs: Sequence[str], kinds: Sequence[str]) -> None:
    width = max(map(len, kinds))
    for name, kind in zip(runs, kinds, strict=True):
        console.print(f"{kind:{width}} {name}".strip(), markup=False, highlight=False, soft_wrap=True)
    console.print()


def _checked(checks: Sequence[Check]) -> dict[str, Any]:
    return {
        "within_tolerance": all(result.met for result in checks) if checks else None,
        "checks": msgspec.to_builtins(checks),
    }


def _matched(comparison: Comparison) -> dict[str, Any]:
    return {"matching": matching_line(comparison), **comparison.to_dict()}


def _print_json(answer: dict[str, Any]) -> None:
    typer.echo(json.dumps(answer, indent=2, allow_nan=False))
