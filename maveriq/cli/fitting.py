"""The work behind `maveriq fit --evaluate`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from maveriq.calibration.evaluation import (
    Errors,
    EvaluatedEstimator,
    Evaluation,
    Group,
    benchmarked_estimator,
    judge,
    read_measurements,
)
from maveriq.calibration.profile_matching import DEFAULT_PROFILE, ProfileMatch, match
from maveriq.estimate.estimator import Estimator
from maveriq.estimate.hardware_profile import HardwareProfile, load_profile
from maveriq.estimate.registry import default_estimator
from maveriq.report.formatting import figure
from maveriq.report.view import Column, Table, number_column, row


def show_errors(
    table: Path,
    profile: str | None,
    name: str | None,
    leave_out: str | None,
    prompt_tokens: int | None,
    *,
    as_json: bool,
) -> None:
    """Print the errors of an estimator on a table.

    Args:
        table: of measurements.
        profile: feeds the estimator; None for the one with prompts like the table's.
        name: of the estimator; None for the better one that the profile can feed.
        leave_out: a model whose ground truth the estimator must not have seen.
        prompt_tokens: of the table, where it does not say them itself.
        as_json: print JSON alone.

    Raises:
        InputError: the table, the profile or the estimator cannot be used.
    """

    def make(hardware: HardwareProfile) -> Estimator:
        return benchmarked_estimator(name or default_estimator(hardware), hardware, without_model=leave_out)

    make(load_profile(profile or DEFAULT_PROFILE))  # what is wrong on the command line comes before what is in files
    rows = list(read_measurements(table))
    matched = match(rows, make, profile=profile, prompt_tokens=prompt_tokens)
    evaluation = judge(rows, matched.subject_of)
    if as_json:
        print_json(_fed_json(matched) | asdict(evaluation))
    else:
        _show(evaluation, table, matched, found_out=profile is None)


def _fed_json(matched: ProfileMatch) -> dict[str, object]:
    """Return what the estimator was fed with; of several profiles each has its own prompts."""
    return {
        "estimator": _estimator_of(matched),
        "profile": ", ".join(one.profile.name for one in matched.fed),
        "prompt_tokens": None if matched.lengths_in_table else matched.fed[0].subject.prompt_tokens,
        "profile_because": matched.why,
        "profiles_tried": [asdict(one) for one in matched.tried],
    }


def _estimator_of(matched: ProfileMatch) -> str:
    return matched.fed[0].subject.estimator.name


def print_json(answer: dict[str, object]) -> None:
    """Print an answer and nothing else."""
    typer.echo(json.dumps(answer, indent=2, allow_nan=False))


def _show(evaluation: Evaluation, table: Path, matched: ProfileMatch, *, found_out: bool) -> None:
    console = Console()
    answered = evaluation.rows - sum(reason.rows for reason in evaluation.left_out)
    prompts = "prompts as the table says" if matched.lengths_in_table else _prompts(matched.fed[0].subject)
    console.print(
        f"{escape(str(table))}: {answered:,} of {evaluation.rows:,} rows answered by "
        f"[bold]{_estimator_of(matched)}[/bold] with profile "
        f"{escape(' and '.join(one.profile.name for one in matched.fed))} ({prompts})",
        soft_wrap=True,
    )
    if found_out:
        console.print(f"profile: {escape(matched.why)}; --profile takes another", soft_wrap=True, highlight=False)
    if evaluation.groups:
        show_groups(console, evaluation.groups)
    for reason in evaluation.left_out:
        console.print(
            f"left out {reason.rows:,} rows: {escape(reason.reason)} (first: {escape(reason.first)})", soft_wrap=True
        )


def _prompts(subject: EvaluatedEstimator) -> str:
    return f"prompts of {subject.prompt_tokens} tokens"


def show_groups(console: Console, groups: Sequence[Group]) -> None:
    """Print errors of latency and of memory, group by group."""
    console.print(_errors_table("latency", [(group, group.latency, group.latency_covered) for group in groups]))
    memory = [(group, group.memory, group.memory_covered) for group in groups if group.memory]
    if memory:
        console.print(_errors_table("memory", memory))


def _errors_table(what: str, rows: Iterable[tuple[Group, Errors, float | None]]) -> Table:
    rows = list(rows)
    covered = any(share is not None for _, _, share in rows)
    headers = ["n", "median", "mean", "p90", "p95", "worst", *(["in 90%"] if covered else [])]
    table_rows, shown = [], ""
    for group, errors, share in rows:
        figures = [*_figures(errors), *([_percent(share)] if covered else [])]
        new = group.by != shown
        table_rows.append(row(group.by if new else "", group.value, *figures, starts_section=new))
        shown = group.by
    columns = [Column("by"), Column("value"), *map(number_column, headers)]
    return Table(f"{what}: absolute error in percent", columns, table_rows, dense=True)


def _figures(errors: Errors) -> list[str]:
    figures = (errors.median, errors.mean, errors.p90, errors.p95, errors.worst)
    return [f"{errors.n:,}", *map(figure, figures)]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1f}"
