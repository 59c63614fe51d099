"""Loads recorded runs of the published testbed by name: their records, and the metadata for run.json."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from maveriq import __version__
from maveriq.domain.records import RunRecord
from maveriq.estimate.hardware_profile import HardwareProfile, load_profile
from maveriq.testbed.recordings import RecordedRun, find_testbed, pick_runs, read_requests, read_runs
from maveriq.testbed.replay import options_of
from maveriq.testbed.run_records import run_record

_PROFILE = "a6000-short"


def testbed_profile() -> HardwareProfile:
    """Return the profile of the testbed's hardware (idle memory, SLOs, dispatcher)."""
    return load_profile(_PROFILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRun:
    """A recorded run and its records."""

    run: RecordedRun
    record: RunRecord


def load_recorded_runs(names: Sequence[str] | None, data: Path | None, *, hint: str = "") -> list[LoadedRun]:
    """Read recorded runs by name.

    Args:
        names: names of the runs; None for all.
        data: the folder of recordings; None for the default one.
        hint: alternatives to a run name, for messages.

    Raises:
        InputError: there is no such run, or the recordings are invalid.
    """
    testbed, profile = find_testbed(data), testbed_profile()
    known = read_runs(testbed)
    runs = list(known) if names is None else pick_runs(known, names, hint=hint)
    scheduled, completed = read_requests(testbed, [run.name for run in runs])
    return [
        LoadedRun(run=run, record=run_record(run, scheduled[run.name], completed[run.name], profile)) for run in runs
    ]


def meta_of_recorded(run: RecordedRun, *, replayed: bool) -> dict[str, Any]:
    """Return the metadata of a recorded run for run.json, with the options that run it again."""
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
        "options": options.to_dict(),
        "seed": options.seed,
        "profile": _PROFILE,
        "versions": {"maveriq": __version__, "python": platform.python_version(), "numpy": version("numpy")},
    }
