"""The figures of recorded runs: those that come with maveriq, and those computed from a folder of recordings.

The package carries a row of figures for each recorded run that is public to this project (data/a6000/recorded-runs.csv,
written by scripts/derive_recorded_runs.py), not the recordings. A folder of recordings may have more runs; its figures
replace those of the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from maveriq.errors import InputError
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.experiment.data_sets import FileState, status_of
from maveriq.experiment.definition import Key
from maveriq.files import data_path
from maveriq.report.metrics import summarise
from maveriq.report.saturation import assess_saturation
from maveriq.runs import whole_run_figures
from maveriq.tables import read_csv
from maveriq.testbed.recordings import RecordedRun, find_testbed, read_requests, read_runs
from maveriq.testbed.run_records import run_record

SHIPPED = "derived from the recording of the published system, 8x A6000 (MaverIQ, SC '25)"
KEY_COLUMNS = ("run", "policy", "intent", "model_set", "trace", "rate_scale", "slo_scale", "saturation")
FIGURE_COLUMNS = (
    "requests", "completed", "latency_mean_s", "latency_p50_s", "latency_p95_s", "latency_p99_s", "throughput_per_s",
    "cost_gib_s_mean", "memory_mean_gib", "gpu_hours", "gpus_busy_mean", "slo_attainment_of_completed",
    "slo_attainment",
)  # fmt: skip
_MAX_FIGURE = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A recorded run: its name, how loaded it was, its figures (None where one does not apply), and their source."""

    run: str
    key: Key
    saturation: str
    figures: Mapping[str, float | None]
    source: str = SHIPPED


def shipped_runs() -> list[Recorded]:
    """Return the recorded runs whose figures come with maveriq."""
    return [
        Recorded(
            run=row.text("run"),
            key=(
                row.text("policy"),
                row.cells["intent"],
                row.text("model_set"),
                row.text("trace"),
                row.number("rate_scale"),
                row.number("slo_scale"),
            ),
            saturation=row.text("saturation"),
            figures={
                name: row.number(name, minimum=0, maximum=_MAX_FIGURE) if row.cells[name] else None
                for name in FIGURE_COLUMNS
            },
        )
        for row in read_csv(
            data_path("a6000", "recorded-runs.csv"), (*KEY_COLUMNS, *FIGURE_COLUMNS), what="figures of recorded runs"
        )
    ]


def recorded_runs(data: Path | None, profile: HardwareProfile) -> dict[Key, Recorded]:
    """Return the recorded runs by what they were: those of the package, and those of a folder.

    Args:
        data: the folder of measured data; None, or a folder without recordings, for the package's alone.
        profile: of the testbed.

    Raises:
        InputError: the recordings in the folder are damaged.
    """
    found = {run.key: run for run in shipped_runs()}
    if data is None or (testbed := _testbed(data)) is None:
        return found
    [status] = status_of(testbed.parent, only="testbed")
    if testbed.name == status.name and all(file.state is FileState.FOUND for file in status.files):
        return found  # those that the package's figures were derived from
    return found | {run.key: run for run in runs_in(testbed, profile)}


def _testbed(data: Path) -> Path | None:
    try:
        return find_testbed(data)
    except InputError:
        return None


def runs_in(testbed: Path, profile: HardwareProfile) -> Iterator[Recorded]:
    """Yield the runs in a folder of recordings, with figures computed from their requests.

    Raises:
        InputError: a file is missing or damaged.
    """
    runs = read_runs(testbed)
    scheduled, completed = read_requests(testbed, [run.name for run in runs])
    for run in runs:
        record = run_record(run, scheduled[run.name], completed[run.name], profile)
        figures = whole_run_figures(summarise(record))
        yield Recorded(
            run=run.name,
            key=_key(run),
            saturation=assess_saturation(record).label.value,
            figures={name: value if (value := figures.get(name)) == value else None for name in FIGURE_COLUMNS},
            source=f"recording in {testbed.name}/: {run.name}",
        )


def _key(run: RecordedRun) -> Key:
    return run.policy, run.intent, run.model_set, run.trace, run.scale, run.slo_scale
