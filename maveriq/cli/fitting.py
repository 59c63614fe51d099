"""The work behind `maveriq fit`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from maveriq.errors import InputError
from maveriq.estimate.base import Estimator
from maveriq.estimate.calibration import to_toml
from maveriq.estimate.catalog import benchmarked_estimator
from maveriq.estimate.crossfit import CrossFit, cross_fit, errors_of, least_trusted
from maveriq.estimate.evaluate import Errors, Evaluation, Group, evaluate
from maveriq.estimate.fitting import Prompts, read_samples, start_calibration
from maveriq.estimate.hardware import HardwareProfile, load_profile
from maveriq.report.tables import new_table
from maveriq.report.wording import figure
from maveriq.tables import is_folder

_DISTRUSTED = 12  # rows shown


def show_errors(
    table: Path, profile: str, name: str, leave_out: str | None, prompt_tokens: int | None, *, as_json: bool
) -> None:
    """Print the errors of an estimator on a table.

    Raises:
        InputError: the table, the profile or the estimator cannot be used.
    """
    hardware = load_profile(profile)
    judged = benchmarked_estimator(name, hardware, without_model=leave_out)
    prompt_tokens = prompt_tokens or hardware.prompt_tokens
    evaluation = evaluate(table, judged, prompt_tokens=prompt_tokens)
    if as_json:
        _print_json({"estimator": judged.name, "profile": hardware.name, **asdict(evaluation)})
    else:
        _show(evaluation, table, judged, hardware, prompt_tokens)


def show_fit(data: Path, out: Path | None, *, as_json: bool) -> None:
    """Fit the calibrated estimator to a folder of tables, and print how far it is from models left out.

    Raises:
        InputError: a table is missing or wrong, or files cannot be written there.
    """
    samples = read_samples(data, Prompts())
    console = Console(stderr=True)
    fitted = cross_fit(samples, start_calibration(), told=lambda what: console.print(f"fitting: {escape(what)}"))
    if out is not None:
        _write(fitted, out, data)
    groups, rows = errors_of(fitted), least_trusted(fitted.answered, _DISTRUSTED)
    if as_json:
        distrusted = [{"row": row, "measured_s": seen, "predicted_s": said} for row, seen, said in rows]
        _print_json({"groups": [asdict(group) for group in groups], "least_trusted": distrusted})
        return
    screen = Console()
    screen.print("every model predicted by a fit to the others:")
    _show_groups(screen, groups)
    screen.print("rows that the fit trusts least:")
    for row, seen, said in rows:
        screen.print(f"  {escape(row)}: measured {seen:.3f} s, predicted {said:.3f} s", soft_wrap=True)


def _write(fitted: CrossFit, out: Path, data: Path) -> None:
    if not is_folder(out):
        raise InputError(f"--out {str(out)!r} is no folder; make it first")
    comment = f"Fitted by `maveriq fit` to {data.name}"
    files = {"calibrated.toml": to_toml(fitted.calibration, f"{comment}.")} | {
        f"calibrated-without-{model}.toml": to_toml(calibration, f"{comment}; full models of {model} left out.")
        for model, calibration in fitted.without.items()
    }
    for name, text in files.items():
        try:
            (out / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"--out {str(out)!r}: {name} cannot be written: {error.strerror or error}") from None


def _print_json(answer: dict[str, object]) -> None:
    typer.echo(json.dumps(answer, indent=2, allow_nan=False))


def _show(
    evaluation: Evaluation, table: Path, judged: Estimator, hardware: HardwareProfile, prompt_tokens: int
) -> None:
    console = Console()
    answered = evaluation.rows - sum(reason.rows for reason in evaluation.left_out)
    console.print(
        f"{escape(str(table))}: {answered:,} of {evaluation.rows:,} rows answered by [bold]{judged.name}[/bold] with "
        f"profile {escape(hardware.name)} (prompts of {prompt_tokens} tokens)",
        soft_wrap=True,
    )
    if evaluation.groups:
        _show_groups(console, evaluation.groups)
    for reason in evaluation.left_out:
        console.print(
            f"left out {reason.rows:,} rows: {escape(reason.reason)} (first: {escape(reason.first)})", soft_wrap=True
        )


def _show_groups(console: Console, groups: Sequence[Group]) -> None:
    console.print(_errors_table("latency", [(group, group.latency, group.latency_covered) for group in groups]))
    console.print(_errors_table("memory", [(group, group.memory, group.memory_covered) for group in groups]))


def _errors_table(what: str, rows: Iterable[tuple[Group, Errors, float | None]]) -> Table:
    rows = list(rows)
    covered = any(share is not None for _, _, share in rows)
    table = new_table(f"{what}: absolute error in percent")
    table.padding = (0, 1, 0, 0)  # nine columns into 80 characters
    for column in ("by", "value"):
        table.add_column(column, no_wrap=True)
    for column in ("n", "median", "mean", "p90", "p95", "worst", *(["in 90%"] if covered else [])):
        table.add_column(column, justify="right", no_wrap=True)
    shown = ""
    for group, errors, share in rows:
        if shown not in ("", group.by):
            table.add_section()
        figures = [*_figures(errors), *([_percent(share)] if covered else [])]
        table.add_row("" if group.by == shown else group.by, escape(group.value), *figures)
        shown = group.by
    return table


def _figures(errors: Errors) -> list[str]:
    figures = (errors.median, errors.mean, errors.p90, errors.p95, errors.worst)
    return [f"{errors.n:,}", *map(figure, figures)]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1f}"
