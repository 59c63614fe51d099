"""The work behind `maveriq testbed`: recorded runs, read, replayed, and written as run folders."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer

from maveriq import __version__
from maveriq.domain.records import RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.errors import InputError
from maveriq.estimate.hardware_profile import HardwareProfile, load_profile
from maveriq.report.metrics import summarise
from maveriq.report.run_folder import check_writable, summary_to_json, write_run
from maveriq.report.saturation import assess_saturation
from maveriq.testbed.recordings import RecordedRun, find_testbed, pick_runs, read_requests, read_runs
from maveriq.testbed.replay import options_of, replay
from maveriq.testbed.run_records import run_record

_PROFILE = "a6000-short"  # the testbed's: what idle GPUs hold, SLOs, dispatcher


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks of `maveriq testbed`; fields as its options."""

    runs: list[str]
    every: bool
    out: Path
    data: Path | None
    as_json: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A recorded run and its records."""

    run: RecordedRun
    record: RunRecord


def recorded(names: Sequence[str] | None, data: Path | None, *, hint: str = "") -> list[Recorded]:
    """Read recorded runs by name, None for all.

    Args:
        names: of the runs.
        data: the folder of recordings; None for the usual one.
        hint: what else could be given for a name, for messages.

    Raises:
        InputError: there is no such run, or the recordings cannot be used.
    """
    testbed, profile = find_testbed(data), load_profile(_PROFILE)
    known = read_runs(testbed)
    runs = list(known) if names is None else pick_runs(known, names, hint=hint)
    scheduled, completed = read_requests(testbed, [run.name for run in runs])
    return [
        Recorded(run=run, record=run_record(run, scheduled[run.name], completed[run.name], profile)) for run in runs
    ]


def write_runs(request: Request, *, replayed: bool) -> None:
    """Write a run folder for each run, and say what is in it.

    Raises:
        InputError: bad input, or a folder that cannot be written.
    """
    if bool(request.runs) == request.every:
        raise InputError("name the recorded runs, or give --all" + ("; not both" if request.every else ""))
    found = recorded(None if request.every else request.runs, request.data)
    folders = [request.out / one.run.name for one in found]
    for folder in folders:
        check_writable(folder)
    profile, told = load_profile(_PROFILE), []
    for one, folder in zip(found, folders, strict=True):
        record = replay(one.record, profile) if replayed else one.record
        _write(folder, replace(one, record=record), profile, replayed=replayed)
        told.append({"folder": str(folder), **{k.label: n for k, n in record.requests.counts().items()}})
        if not request.as_json:
            typer.echo(_line(record, folder))
    if request.as_json:
        typer.echo(json.dumps(told, indent=2))


def _line(record: RunRecord, folder: Path) -> str:
    counts = record.requests.counts()
    told = [f"{counts[RequestStatus.COMPLETED]:,} of {len(record.requests):,} requests completed"]
    told += [f"{count:,} {status.label}" for status, count in counts.items() if count and status.label != "completed"]
    return f"{folder}: {', '.join(told)}"


def _write(folder: Path, one: Recorded, profile: HardwareProfile, *, replayed: bool) -> None:
    summary = summary_to_json(summarise(one.record), assess_saturation(one.record), one.record.deployments)
    write_run(folder, one.record, summary, _meta(one.run, profile, replayed=replayed))


def _meta(run: RecordedRun, profile: HardwareProfile, *, replayed: bool) -> dict[str, Any]:
    """Return what led to the records, and the options that run the same again."""
    options = options_of(run)
    notes = ["The recording has no first tokens; its deployments hold what was measured."]
    if run.policy.startswith("AlpaServe"):
        notes.append("Its requests were drawn in another way than maveriq draws them for these options.")
    if replayed:
        notes.append("Arrivals, service times and plans are the recorded ones; when each request went is maveriq's.")
    return {
        "kind": "replayed" if replayed else "recorded",
        "source": {"what": "testbed of the MaverIQ paper (SC '25), 8x A6000", "run": run.name, "policy": run.policy},
        "workload": run.name,
        "notes": notes,
        "options": asdict(options),
        "seed": options.seed,
        "profile": profile.name,
        "versions": {"maveriq": __version__, "python": platform.python_version(), "numpy": version("numpy")},
    }
