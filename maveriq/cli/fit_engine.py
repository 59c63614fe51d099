"""`maveriq fit RUN... --models SET`: fits the times of an engine's process to the recorded requests of a deployment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape

from maveriq.calibration.deployment import Deployment, read_deployment
from maveriq.calibration.recorded_requests import recorded_requests
from maveriq.calibration.serving_fit import FIELDS, FittedTimes, RecordedRequests, fit_times
from maveriq.errors import InputError
from maveriq.estimate.engine_presets import EngineTimes
from maveriq.estimate.fitted_profile import fitted_profile_toml
from maveriq.files import check_file_writable, written_whole
from maveriq.report.formatting import figure
from maveriq.report.terminal import open_console
from maveriq.report.view import Column, Table, number_column, row

_WHAT = "profile"
_ALIKE = 0.9
"""The correlation from which two times are hard to tell apart."""


def fit_engine(
    runs: Sequence[Path],
    *,
    models: str,
    gpus: str,
    max_in_flight: int | None,
    warm_up: int | None,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Fit, write the profile, and print what was found with its uncertainty.

    Args:
        runs: tables of recorded requests, or run folders, all of the same deployment.
        models: the model set that describes it.
        gpus: its GPUs.
        max_in_flight: of the client that recorded them.
        warm_up: first requests of each that do not count; None for a tenth, at most 100.
        out: the profile to write; None for none.
        overwrite: replace it.
        as_json: print only JSON.

    Raises:
        InputError: a file is missing or wrong, or the profile cannot be written.
    """
    if out is not None:
        if out.suffix != ".toml":
            raise InputError(f"--out {str(out)!r}: a fit to recorded requests writes one TOML file; name it FILE.toml")
        check_file_writable(out, what=_WHAT, overwrite=overwrite)
    deployment = read_deployment(models, gpus)
    recorded = [recorded_requests(path, deployment, max_in_flight=max_in_flight, warm_up=warm_up) for path in runs]
    progress = open_console(stderr=True)
    fitted = fit_times(
        recorded,
        deployment.preset.times,
        on_round=lambda number, times: progress.print(f"fitting: round {number}, {_short(times)}", highlight=False),
    )
    if out is not None:
        requests, names = sum(len(each.requests) for each in recorded), ", ".join(each.name for each in recorded)
        text = fitted_profile_toml(
            f"{deployment.model.name} on {deployment.profile.gpu_kind}",
            deployment.profile.gpu_kind,
            {deployment.preset.name: fitted.times},
            source=f"maveriq fit, {requests} requests of {names}",
        )
        with written_whole(out, what=_WHAT, overwrite=overwrite) as partial:
            partial.write_text(text, encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(_as_json(deployment, fitted), indent=2, allow_nan=False))
    else:
        _show(open_console(), deployment, recorded, fitted, out)


def _short(times: EngineTimes) -> str:
    return ", ".join(f"{name} {figure(getattr(times, name))}" for name in FIELDS)


def alike(fitted: FittedTimes) -> list[tuple[str, str]]:
    """Return the pairs of fitted times that the recordings cannot tell apart, because either explains them."""
    return [
        (name, other)
        for index, name in enumerate(fitted.free)
        for later, other in enumerate(fitted.free[index + 1 :], index + 1)
        if abs(fitted.correlation[index, later]) > _ALIKE and {name, other} & {*fitted.identified}
    ]


def _as_json(deployment: Deployment, fitted: FittedTimes) -> dict[str, object]:
    return {
        "preset": deployment.preset.name,
        "times": {
            name: {
                "value": getattr(fitted.times, name),
                "uncertainty": getattr(fitted.times.uncertainty, name),
                "identified": name in fitted.identified,
            }
            for name in fitted.free
        },
        "hard_to_separate": [list(pair) for pair in alike(fitted)],
        "errors_percent": {
            recording: {name: 100 * float(np.expm1(error)) for name, error in errors.items()}
            for recording, errors in fitted.errors.items()
        },
    }


def _show(
    console: Console,
    deployment: Deployment,
    recorded: Sequence[RecordedRequests],
    fitted: FittedTimes,
    out: Path | None,
) -> None:
    requests = sum(len(each.requests) for each in recorded)
    console.print(
        f"{escape(deployment.model.name)} on {deployment.configuration.gpus} {deployment.profile.gpu_kind}, "
        f"{deployment.preset.name}: {requests:,} recorded requests",
        highlight=False,
        soft_wrap=True,
    )
    rows = [
        row(
            name,
            figure(getattr(deployment.preset.times, name)),
            figure(getattr(fitted.times, name)),
            figure(getattr(fitted.times.uncertainty, name)),
            "" if name in fitted.identified else "not in the data",
        )
        for name in fitted.free
    ]
    columns = [Column("time"), *map(number_column, ("preset", "fitted", "±")), Column("")]
    console.print(Table("times of the engine", columns, rows, dense=True))
    for name, other in alike(fitted):
        console.print(
            f"the data cannot separate {name} and {other}: a larger one and a smaller other give the same times. "
            "Record runs at more loads",
            soft_wrap=True,
            highlight=False,
        )
    errors = [
        row(recording, name, f"{100 * float(np.expm1(error)):+.1f}", starts_section=index == 0)
        for recording, found in fitted.errors.items()
        for index, (name, error) in enumerate(found.items())
    ]
    console.print(
        Table(
            "replay against recording, in percent",
            [Column("run"), Column("figure"), number_column("off")],
            errors,
            dense=True,
        )
    )
    if out is not None:
        console.print(f"profile: {escape(str(out))}; use it: --profile {escape(str(out))}", soft_wrap=True)
