"""Replays of the recorded runs: recorded arrivals, service times and plans, with maveriq's queue and dispatcher.

Only the dispatch times are simulated (SPEC 6), so the errors of the latencies are those of the queue model.
`maveriq testbed replay --all` and `maveriq compare` do the same on run folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from maveriq.domain.records import RunRecord
from maveriq.errors import InvariantError
from maveriq.estimate.hardware_profile import load_profile
from maveriq.report.compare import Comparison, compare
from maveriq.testbed.recordings import read_completed, read_runs, read_scheduled
from maveriq.testbed.replay import replay
from maveriq.testbed.run_records import run_record

_PROFILE = "a6000-short"


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueErrors:
    """Errors of the latencies of a replay against the recorded ones.

    `mean_error` and `p95_error` are signed, `median_request_error` is the median over requests
    of the absolute error; all in percent of the recorded latency.
    """

    run: str
    requests: int
    recorded_mean_s: float
    recorded_p95_s: float
    mean_error: float
    p95_error: float
    median_request_error: float


def read_recordings(data: Path) -> dict[str, RunRecord]:
    """Return the records of every recorded run, by name.

    Args:
        data: the folder of measured data.
    """
    testbed, profile = data / "testbed", load_profile(_PROFILE)
    scheduled, completed = read_scheduled(testbed), read_completed(testbed)
    return {run.name: run_record(run, scheduled[run.name], completed[run.name], profile) for run in read_runs(testbed)}


def replay_all(recordings: Mapping[str, RunRecord]) -> Iterator[QueueErrors]:
    """Yield the errors of each recorded run, the baselines' included."""
    profile = load_profile(_PROFILE)
    for name, recorded in recordings.items():
        yield errors_of(name, compare(replay(recorded, profile), recorded))


def errors_of(run: str, comparison: Comparison) -> QueueErrors:
    """Return the errors of a replay from its comparison with the recorded run.

    Raises:
        InvariantError: the replay lacks requests of the run.
    """
    overall = comparison.overall
    mean, p95 = overall.differences["mean"], overall.differences["p95"]
    if overall.sim_completed != overall.real_completed:
        raise InvariantError(f"{run}: a replay must complete all {overall.real_completed} requests")
    return QueueErrors(
        run=run,
        requests=overall.real_completed,
        recorded_mean_s=_known(mean.real),
        recorded_p95_s=_known(p95.real),
        mean_error=_known(mean.error),
        p95_error=_known(p95.error),
        median_request_error=_known(overall.request_error),
    )


def _known(value: float | None) -> float:
    if value is None:
        raise InvariantError("a replay whose requests are matched has every figure")
    return value
