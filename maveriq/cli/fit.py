"""`maveriq fit`: fits estimators to measurements and engines to recorded requests, or evaluates an estimator."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.markup import escape

from maveriq.calibration.cross_validation import (
    CrossFit,
    cross_fit,
    errors_of,
    least_trusted,
)
from maveriq.calibration.evaluation import (
    Errors,
    Evaluation,
    Group,
    benchmarked_estimator,
    evaluate_rows,
)
from maveriq.calibration.fitting import Kinds, exponents_csv, fit_exponents, start_calibration, start_for
from maveriq.calibration.measurements import read_measurements
from maveriq.calibration.online import cross_fit_online, errors_without
from maveriq.calibration.profile_matching import ProfileMatch, match
from maveriq.calibration.samples import read_samples
from maveriq.cli.options import JsonFlag, OverwriteFlag
from maveriq.errors import InputError
from maveriq.estimate.calibration_file import OnlineCalibration, online_csv, to_toml
from maveriq.estimate.estimator import Estimator
from maveriq.estimate.hardware_profile import DEFAULT_PROFILE, HardwareProfile, load_profile
from maveriq.estimate.registry import default_estimator
from maveriq.files import check_file_writable, exists, is_folder, written_whole
from maveriq.report.formatting import figure
from maveriq.report.reading import read_run
from maveriq.report.terminal import open_console
from maveriq.report.view import Column, Table, number_column, row
from maveriq.testbed.engines import RecordedEngine, engines_of, read_engines

_LEAST_TRUSTED_SHOWN = 12
_FITTED = "fitted file"
_FITTED_FILE = re.compile(r"calibrated(-without-.+)?\.toml|calibrated-served\.csv|exponents\.csv")
"""The names of the files that a fit writes."""


def fit(
    data: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[DATA | RUN...]",
            help="Fit the calibrated estimator to this table, or folder of tables. With --models: fit the times of an "
            "engine to recorded requests, tables or run folders of one deployment.",
        ),
    ] = None,
    *,
    table: Annotated[
        Path | None,
        typer.Option(
            "--evaluate", metavar="TABLE", help="Compare an estimator with this CSV file of latencies and memory."
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="The hardware profile of the estimator: a name or a TOML file.",
            show_default="the one with prompts like the table's",
        ),
    ] = None,
    estimator: Annotated[
        str | None, typer.Option(help="The estimator to evaluate: calibrated or paper.", show_default="calibrated")
    ] = None,
    leave_out: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Use the calibration fitted without this model's measurements; each: without the model of each row.",
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1_000_000,
            help="Length of a table's prompts, where it has no column for it.",
            show_default="from the best match; to fit: as published",
        ),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(metavar="SET", help="The model set of the deployment that served the recorded requests of RUN..."),
    ] = None,
    gpus: Annotated[str | None, typer.Option(help="The GPUs of that deployment: 1xH100-SXM.")] = None,
    max_in_flight: Annotated[
        int | None, typer.Option(min=1, help="Requests that the client of RUN... had in flight at most.")
    ] = None,
    warm_up: Annotated[
        int | None,
        typer.Option(min=0, help="First requests of each RUN that do not count.", show_default="a tenth, at most 100"),
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Also fit the online calibration: to the run folders in it, or to recordings of the testbed.",
        ),
    ] = None,
    gpus_per_socket: Annotated[
        int, typer.Option(min=1, max=10_000, help="GPUs per CPU socket of the host that recorded --runs.")
    ] = 4,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Where a fit writes its files: a folder; with --models a TOML file for --profile.",
            show_default="nowhere",
        ),
    ] = None,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Evaluate an estimator on measurements, or fit to them.

    A fit is of the calibrated estimator to a table of latencies, or, with --models, of the times of an engine that
    batches continuously to the requests that it served.
    """
    if models is not None or (gpus, max_in_flight, warm_up) != (None, None, None):
        _fit_to_requests(
            data,
            (table, profile, estimator, leave_out, prompt_tokens, runs),
            models=models, gpus=gpus, max_in_flight=max_in_flight, warm_up=warm_up, out=out, overwrite=overwrite,
            as_json=as_json,
        )  # fmt: skip
        return
    if (data is None) == (table is None) or (data is not None and len(data) > 1):
        raise InputError(
            "give --evaluate TABLE to compare an estimator, or a folder DATA to fit one, not both; or RUN... and "
            "--models SET to fit an engine to recorded requests"
        )
    if table is not None:
        if (out, runs) != (None, None):
            raise InputError("--out and --runs belong to a fit; leave them away with --evaluate")
        _evaluate(table, profile, estimator, leave_out, prompt_tokens, as_json=as_json)
    elif data:
        if (profile, estimator, leave_out) != (None, None, None):
            raise InputError("--profile, --estimator and --leave-out belong to --evaluate; leave them away")
        _check_out(out, overwrite=overwrite)
        _fit(data[0], prompt_tokens, runs, gpus_per_socket, out, overwrite=overwrite, as_json=as_json)


def _check_out(out: Path | None, *, overwrite: bool) -> None:
    """Check, before long work, that a fit may write its files."""
    if out is None:
        return
    if not is_folder(out):
        raise InputError(f"--out {str(out)!r} is no folder; make it first")
    for path in sorted(out.glob("*")):
        if _FITTED_FILE.fullmatch(path.name):
            check_file_writable(path, what=_FITTED, overwrite=overwrite)


def _fit_to_requests(
    data: Sequence[Path] | None,
    others: Sequence[object],
    *,
    models: str | None,
    gpus: str | None,
    max_in_flight: int | None,
    warm_up: int | None,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Fit the times of an engine; `others` are the options that do not belong to that."""
    from maveriq.cli.fit_engine import fit_engine

    if models is None:
        raise InputError("--gpus, --max-in-flight and --warm-up belong to a fit to recorded requests; add --models SET")
    if not data:
        raise InputError("--models: name the recorded requests, RUN..., that the deployment served")
    if any(other is not None for other in others):
        raise InputError(
            "a fit to recorded requests takes --models, --gpus, --max-in-flight, --warm-up and --out alone"
        )
    if gpus is None:
        raise InputError("--models: name the GPUs of the deployment: --gpus 1xH100-SXM")
    fit_engine(
        data, models=models, gpus=gpus, max_in_flight=max_in_flight, warm_up=warm_up, out=out, overwrite=overwrite,
        as_json=as_json,
    )  # fmt: skip


def _print_json(answer: Mapping[str, object]) -> None:
    typer.echo(json.dumps(answer, indent=2, allow_nan=False))


# Evaluation


def _evaluate(
    table: Path,
    profile: str | None,
    name: str | None,
    leave_out: str | None,
    prompt_tokens: int | None,
    *,
    as_json: bool,
) -> None:
    """Print the errors of an estimator on a table.

    Raises:
        InputError: the table, the profile or the estimator cannot be used.
    """

    def make_estimator(hardware: HardwareProfile) -> Estimator:
        return benchmarked_estimator(name or default_estimator(hardware), hardware, without_model=leave_out)

    make_estimator(load_profile(profile or DEFAULT_PROFILE))  # reports errors of the command line before those of files
    rows = list(read_measurements(table))
    matched = match(rows, make_estimator, profile=profile, prompt_tokens=prompt_tokens)
    evaluation = evaluate_rows(rows, matched.estimator_of)
    if as_json:
        _print_json(_match_json(matched) | asdict(evaluation))
    else:
        _show_evaluation(evaluation, table, matched, profile_matched=profile is None)


def _match_json(matched: ProfileMatch) -> dict[str, object]:
    """Return which profiles the estimator used; each of several profiles has its own prompts."""
    return {
        "estimator": _estimator_name(matched),
        "profile": _profile_names(matched, ", "),
        "prompt_tokens": None if matched.lengths_in_table else matched.inputs[0].evaluated.prompt_tokens,
        "profile_because": matched.why,
        "profiles_tried": [asdict(trial) for trial in matched.trials],
    }


def _estimator_name(matched: ProfileMatch) -> str:
    return matched.inputs[0].evaluated.estimator.name


def _profile_names(matched: ProfileMatch, separator: str) -> str:
    return separator.join(used.profile.name for used in matched.inputs)


def _show_evaluation(evaluation: Evaluation, table: Path, matched: ProfileMatch, *, profile_matched: bool) -> None:
    console = open_console()
    answered = evaluation.rows - sum(reason.rows for reason in evaluation.left_out)
    prompts = f"prompts of {matched.inputs[0].evaluated.prompt_tokens} tokens"
    console.print(
        f"{escape(str(table))}: {answered:,} of {evaluation.rows:,} rows answered by "
        f"[bold]{_estimator_name(matched)}[/bold] with profile {escape(_profile_names(matched, ' and '))} "
        f"({'prompts as the table says' if matched.lengths_in_table else prompts})",
        soft_wrap=True,
    )
    if profile_matched:
        console.print(f"profile: {escape(matched.why)}; --profile takes another", soft_wrap=True, highlight=False)
    if evaluation.groups:
        _show_groups(console, evaluation.groups)
    for reason in evaluation.left_out:
        console.print(
            f"left out {reason.rows:,} rows: {escape(reason.reason)} (first: {escape(reason.first)})", soft_wrap=True
        )


def _show_groups(console: Console, groups: Sequence[Group]) -> None:
    """Print the errors of latency and of memory by group."""
    console.print(_errors_table("latency", [(group, group.latency, group.latency_covered) for group in groups]))
    memory = [(group, group.memory, group.memory_covered) for group in groups if group.memory]
    if memory:
        console.print(_errors_table("memory", memory))


def _errors_table(what: str, rows: Iterable[tuple[Group, Errors, float | None]]) -> Table:
    rows = list(rows)
    has_coverage = any(covered is not None for _, _, covered in rows)
    headers = ["n", "median", "mean", "p90", "p95", "worst", *(["in 90%"] if has_coverage else [])]
    table_rows, previous = [], ""
    for group, errors, covered in rows:
        cells = [f"{errors.n:,}", *map(figure, (errors.median, errors.mean, errors.p90, errors.p95, errors.worst))]
        if has_coverage:
            cells.append("" if covered is None else f"{covered:.1f}")
        is_new = group.by != previous
        table_rows.append(row(group.by if is_new else "", group.value, *cells, starts_section=is_new))
        previous = group.by
    columns = [Column("by"), Column("value"), *map(number_column, headers)]
    return Table(f"{what}: absolute error in percent", columns, table_rows, dense=True)


# Fit


@dataclass(frozen=True, slots=True, kw_only=True)
class _OnlineFit:
    """The online calibration: of all runs, without each run, and its errors in percent.

    The errors are those of runs that the fit left out, where there are several runs.
    """

    calibration: OnlineCalibration
    without: Mapping[str, OnlineCalibration]
    errors: Sequence[float]
    runs_left_out: bool


def _fit(
    data: Path,
    prompt_tokens: int | None,
    runs: Path | None,
    gpus_per_socket: int,
    out: Path | None,
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Fit the calibrated estimator, write its files, and print its errors on models that each fit left out.

    Raises:
        InputError: a table or a run is missing or wrong, or the files cannot be written.
    """
    recorded = _recorded_engines(runs) if runs else []
    samples = read_samples(data, prompt_tokens=prompt_tokens)
    report = _progress_report()
    fitted = cross_fit(samples, start_for(samples, start_calibration()), on_fit=report)
    online = None
    if recorded:
        report("the online calibration")
        online = _fit_online(fitted, recorded, gpus_per_socket)
    if out is not None:
        report("the exponents of the paper's formula")
        _write(fitted, online, fit_exponents(samples, fitted.constants), out, data, overwrite=overwrite)
    if as_json:
        _print_json(_fit_json(fitted, online))
    else:
        _show_fit(fitted, online, recorded)


def _progress_report() -> Callable[[str], None]:
    console = open_console(stderr=True)
    return lambda what: console.print(f"fitting: {escape(what)}")


def _recorded_engines(folder: Path) -> list[RecordedEngine]:
    """Read recordings of the testbed, or a run folder, or a folder of them."""
    if exists(folder / "completed.csv.gz"):
        return read_engines(folder)
    runs = [path.parent for path in sorted([folder / "run.json", *folder.glob("*/run.json")]) if exists(path)]
    found = [engine for path in runs for engine in engines_of(path.resolve().name, read_run(path))]
    if not found:
        raise InputError(
            f"--runs {str(folder)!r} holds no run folder with a deployment that served requests one by one; name a "
            "folder of run folders, or the recordings of a testbed"
        )
    return found


def _fit_online(fitted: CrossFit, recorded: Sequence[RecordedEngine], gpus_per_socket: int) -> _OnlineFit:
    ratio, calibration = fitted.layer_time_ratio, fitted.calibration
    online, without = cross_fit_online(ratio, calibration, recorded, gpus_per_socket)
    left_out = errors_without(ratio, calibration, recorded, without)
    same_runs = dict.fromkeys((engine.run for engine in recorded), online)
    errors = left_out or errors_without(ratio, calibration, recorded, same_runs)
    return _OnlineFit(calibration=online, without=without, errors=errors, runs_left_out=bool(left_out))


def _write(
    fitted: CrossFit, online: _OnlineFit | None, exponents: Kinds, out: Path, data: Path, *, overwrite: bool
) -> None:
    comment = f"Fitted by `maveriq fit` to {data.name}"
    calibration = fitted.calibration
    if online is not None:
        calibration = msgspec.structs.replace(calibration, online=online.calibration)
    files = {"calibrated.toml": to_toml(calibration, f"{comment}.")} | {
        f"calibrated-without-{model}.toml": to_toml(without, f"{comment}; full models of {model} left out.")
        for model, without in fitted.without.items()
    }
    if online and online.without:
        files["calibrated-served.csv"] = online_csv(online.without)
    if exponents:
        files["exponents.csv"] = exponents_csv(exponents)
    for name, text in files.items():
        with written_whole(out / name, what=_FITTED, overwrite=overwrite) as partial:
            partial.write_text(text, encoding="utf-8")


def _fit_json(fitted: CrossFit, online: _OnlineFit | None) -> dict[str, object]:
    rows = least_trusted(fitted.predictions, _LEAST_TRUSTED_SHOWN)
    answer: dict[str, object] = {
        "groups": [asdict(group) for group in errors_of(fitted)],
        "least_trusted": [
            {"row": sample, "measured_s": measured_s, "predicted_s": predicted_s}
            for sample, measured_s, predicted_s in rows
        ],
    }
    if online:
        answer["live"] = {
            "deployments": len(online.errors),
            "median": float(np.median(online.errors)),
            "worst": max(online.errors),
            "runs_left_out": online.runs_left_out,
        }
    return answer


def _show_fit(fitted: CrossFit, online: _OnlineFit | None, recorded: Sequence[RecordedEngine]) -> None:
    console = open_console()
    console.print("every model predicted by a fit to the others:")
    _show_groups(console, errors_of(fitted))
    console.print("rows that the fit trusts least:")
    for sample, measured_s, predicted_s in least_trusted(fitted.predictions, _LEAST_TRUSTED_SHOWN):
        console.print(f"  {escape(sample)}: measured {measured_s:.3f} s, predicted {predicted_s:.3f} s", soft_wrap=True)
    if online:
        runs = len({engine.run for engine in recorded})
        how = "each by figures without its run" if online.runs_left_out else "by figures fitted to them"
        console.print(
            f"median service times of {len(online.errors)} deployments in {runs} recorded runs, {how}: off by "
            f"{np.median(online.errors):.1f} % in the median, {max(online.errors):.1f} % at worst",
            soft_wrap=True,
            highlight=False,
        )
