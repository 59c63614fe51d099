"""With recorded arrivals, service times and plans, simulated latencies equal the recorded ones (SPEC 6)."""

from collections.abc import Mapping

import pytest
from queue_model import QueueErrors

from maveriq.files import measured_data_path
from maveriq.testbed.recordings import read_runs

pytestmark = [pytest.mark.data, pytest.mark.heavy]

MAX_PERCENT = 2.0
DATA = measured_data_path()
RUNS = [run.name for run in read_runs(DATA / "testbed")] if DATA else []


def test_every_recorded_run_is_replayed_completely(replayed: Mapping[str, QueueErrors]) -> None:
    assert list(replayed) == RUNS
    assert len(replayed) == 22
    assert sum(errors.requests for errors in replayed.values()) == 60_862


@pytest.mark.parametrize("run", RUNS)
def test_latencies_equal_the_recorded_ones_within_two_percent(run: str, replayed: Mapping[str, QueueErrors]) -> None:
    errors = replayed[run]
    assert abs(errors.mean_error) <= MAX_PERCENT, errors
    assert abs(errors.p95_error) <= MAX_PERCENT, errors
    assert errors.median_request_error < MAX_PERCENT, errors
