"""The records of every recorded run contain all its requests."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from maveriq.domain.records import RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.scenario.build import build_system
from maveriq.tables import read_csv
from maveriq.testbed.recordings import read_runs, read_scheduled
from maveriq.testbed.replay import options_of

pytestmark = pytest.mark.data

COLUMNS = (
    "run", "policy", "model_set", "intent", "trace", "rate_scale", "slo_scale", "scheduled", "completed",
    "deployments",
)  # fmt: skip


@pytest.mark.heavy
def test_every_request_of_every_schedule_ends_in_one_status(
    measured_data: Path, recordings: Mapping[str, RunRecord]
) -> None:
    for row in read_csv(measured_data / "testbed" / "runs.csv", COLUMNS, what="recorded runs"):
        record = recordings[row.text("run")]
        counts = record.requests.counts()
        assert sum(counts.values()) == len(record.requests) == row.count("scheduled")
        assert counts[RequestStatus.COMPLETED] == row.count("completed")
        assert counts[RequestStatus.FAILED] == 0
        assert len(record.deployments) == row.count("deployments")


def test_times_and_memory_are_possible(recordings: Mapping[str, RunRecord]) -> None:
    for name, record in recordings.items():
        table = record.requests
        done = table.status == RequestStatus.COMPLETED.value
        assert (np.diff(table.arrival_us) >= 0).all(), name
        assert (table.start_us[done] >= table.arrival_us[done]).all(), name
        assert (table.finish_us[done] > table.start_us[done]).all(), name
        assert table.finish_us.max() <= record.ended_us, name
        assert max(sample.memory_bytes for sample in record.gpu_samples) < 48 << 30, name
        assert all(min(deployment.plan.gpu_bytes) > 1 << 30 for deployment in record.deployments if deployment.plan), (
            name
        )


def test_descriptions_give_the_recorded_requests_of_maveriq(
    measured_data: Path, recordings: Mapping[str, RunRecord]
) -> None:
    """A blind run starts with the recorded requests: order, models and SLOs are equal."""
    run = next(run for run in read_runs(measured_data / "testbed") if run.by_maveriq and run.slo_scale)
    drawn, table = build_system(options_of(run)).workload.arrivals, recordings[run.name].requests
    order = np.argsort(table.request_id)
    assert np.array_equal(table.endpoint_id[order], drawn.endpoint_id)
    assert np.array_equal(table.slo_us[order], drawn.slo_us)
    assert np.abs(table.arrival_us[order] - drawn.arrival_us).max() < 200_000


def test_descriptions_give_the_recorded_requests_of_the_baselines(measured_data: Path) -> None:
    """All schedules of AlpaServe and AlpaServe*: every time (to the microsecond) and every replica."""
    testbed = measured_data / "testbed"
    runs = [run for run in read_runs(testbed) if not run.by_maveriq]
    schedules = read_scheduled(testbed, [run.name for run in runs])
    for run in runs:
        options = replace(options_of(run), alpaserve_as_published=True, alpaserve_requests_as_published=True)
        drawn, recorded = build_system(options).workload.arrivals, schedules[run.name]
        order = np.argsort(recorded.request_id)
        assert np.array_equal(recorded.endpoint_id[order], drawn.endpoint_id), run.name
        assert np.array_equal(recorded.arrival_us[order], drawn.arrival_us), run.name
