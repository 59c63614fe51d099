"""The planned side of `maveriq profile`: shows the plan, measures it, writes one profile."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from maveriq.errors import InputError
from maveriq.estimate.profile_file import PROFILE_NAME
from maveriq.files import not_overwritten, written_whole
from maveriq.profiling.plan import ProfilePlan
from maveriq.profiling.planned import SCRATCH_PREFIX, PlannedProfile, measure_plan
from maveriq.profiling.session import LOG_NAME, begun_session
from maveriq.report.run_folder import check_writable
from maveriq.report.terminal import open_console
from maveriq.report.view import Column, Table, number_column, row


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a profile goes: the folder, and whether one that is there is replaced."""

    folder: Path
    overwrite: bool


def check_profile_folder(target: Target) -> None:
    """Check that a profile may go to a folder: an empty one, one of an unfinished profile, or one to be replaced.

    Raises:
        InputError: it may not.
    """
    folder = target.folder
    check_writable(folder, files=(), overwrite=True)
    found = [path.name for path in folder.iterdir()] if folder.exists() else []
    names = {name for name in found if not name.startswith(SCRATCH_PREFIX)}
    if names - {LOG_NAME, PROFILE_NAME}:
        raise InputError(
            f"output folder {str(folder)!r} holds files that are no profile; name an empty or a new folder"
        )
    if PROFILE_NAME in names and not target.overwrite:
        raise not_overwritten(f"profile {str(folder / PROFILE_NAME)!r}")


def profile_by_plan(profile: PlannedProfile, target: Target | None, *, dry_run: bool, as_json: bool) -> None:
    """Plan, show the plan, and unless `dry_run` measure and write the profile; go on with what was begun.

    Raises:
        InputError: nothing can be measured, or the folder holds something else.
        MaveriqError: an engine failed, or memory or disk are short.
    """
    begun = None if target is None or target.overwrite else begun_session(target.folder)
    plan = profile.plan() if begun is None else begun.plan
    if as_json and dry_run:
        open_console().print_json(json.dumps(plan_json(plan)))
    elif not as_json:
        show_plan(plan)
    if dry_run or target is None:
        return
    if target.overwrite:
        for name in (LOG_NAME, PROFILE_NAME):
            (target.folder / name).unlink(missing_ok=True)
    console = open_console(stderr=True)

    def report(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    file = measure_plan(profile, plan, target.folder, report)
    path = target.folder / PROFILE_NAME
    with written_whole(path, what="profile", overwrite=True) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n")
    (target.folder / LOG_NAME).unlink(missing_ok=True)
    if as_json:
        open_console().print_json(json.dumps({"profile": str(path), **plan_json(plan)}))
        return
    open_console().print(f"profile: {path}\nuse it: --profile {path}", highlight=False, markup=False, soft_wrap=True)


def plan_json(plan: ProfilePlan) -> dict[str, object]:
    """Return a plan in plain values."""
    return {
        "expected_s": round(plan.expected_s, 1),
        "gpu_hours": round(plan.gpu_hours, 4),
        "estimates": plan.estimates,
        "error_before": round(plan.error_before, 4),
        "error_after": round(plan.error_after, 4),
        "ends": plan.ends,
        "runs": [
            {**msgspec.to_builtins(run), "expected_s": round(run.expected_s, 1), "gpus": run.configuration.gpus}
            for run in plan.runs
        ],
    }


def show_plan(plan: ProfilePlan) -> None:
    """Print a plan as a table."""
    columns = [
        Column("model"),
        number_column("layers"),
        Column("configuration"),
        number_column("batches"),
        Column("size x prompt"),
        number_column("s"),
    ]
    rows = [
        row(
            run.model,
            str(len(run.layers)),
            str(run.configuration),
            str(len(run.cases)),
            f"{_range([case.batch for case in run.cases])} x {_range([case.prompt_tokens for case in run.cases])}",
            f"{run.expected_s:.0f}",
        )
        for run in plan.runs
    ]
    console = open_console()
    console.print(Table("what is measured", columns, rows))
    console.print(
        f"{len(plan.runs)} engines, {sum(len(run.cases) for run in plan.runs)} batches: about {plan.expected_s:.0f} s, "
        f"{plan.gpu_hours:.2f} GPU-hours. Expected error of {plan.estimates} estimates: {plan.error_before:.0%} "
        f"before, {plan.error_after:.1%} after; {plan.ends}.",
        highlight=False,
        soft_wrap=True,
    )


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"
