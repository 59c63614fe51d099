"""Laws of comparing two runs."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_fixtures import runs

from maveriq.domain.records import NOT_YET, RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.report.compare import QUANTITIES, UNITS, Tolerance, check, compare, ks_distance

few = settings(max_examples=40, deadline=None)
samples = st.lists(st.integers(0, 50), min_size=1, max_size=30).map(np.array)


def scaled(run: RunRecord, factor: float) -> RunRecord:
    """Scale the waiting and service times of completed requests."""
    table = run.requests

    def later(times_us: np.ndarray) -> np.ndarray:
        scaled_us = table.arrival_us + np.rint((times_us - table.arrival_us) * factor).astype(np.int64)
        return np.where((table.status == RequestStatus.COMPLETED) & (times_us != NOT_YET), scaled_us, times_us)

    requests = replace(table, start_us=later(table.start_us), finish_us=later(table.finish_us))
    return replace(run, requests=requests)


@few
@given(runs())
def test_a_run_equals_itself(run: RunRecord) -> None:
    found = compare(run, run)
    assert found.unmatched == ""
    for distance in (found.overall, *found.models.values()):
        assert {difference.error for difference in distance.differences.values()} <= {0.0, None}
        assert distance.ks in (0.0, None)
        assert distance.request_error in (0.0, None)
    assert all(pair.same_configuration and pair.same_gpus for pair in found.deployments)
    assert found.sim_saturation == found.real_saturation
    assert all(
        outcome.met for outcome in check(found, [Tolerance(name=name, limit=0) for name in UNITS if name != "request"])
    )


@few
@given(runs(), runs())
def test_swapping_two_runs_swaps_their_figures_and_flips_signs(run: RunRecord, other: RunRecord) -> None:
    there, back = compare(run, other), compare(other, run)
    for quantity in QUANTITIES:
        ours, theirs = there.overall.differences[quantity.name], back.overall.differences[quantity.name]
        assert (ours.sim, ours.real) == (theirs.real, theirs.sim)
        if ours.error is not None and theirs.error is not None:
            assert np.sign(ours.error) == -np.sign(theirs.error)
    assert there.overall.ks == back.overall.ks
    assert bool(there.unmatched) == bool(back.unmatched)
    assert (there.sim_saturation, there.real_saturation) == (back.real_saturation, back.sim_saturation)


@few
@given(runs(), st.sampled_from([0.5, 1.1, 2.0]))
def test_scaled_latencies_have_errors_of_that_factor(run: RunRecord, factor: float) -> None:
    found = compare(scaled(run, factor), run).overall
    names = ("mean", "p50", "p95", "p99", "queue-mean", "service-mean", "service-p95", "cost")
    for name in names:
        difference = found.differences[name]
        if difference.error is not None and difference.real and difference.real > 0.1:  # times are rounded to 1 µs
            assert difference.error == pytest.approx(100 * (factor - 1), abs=0.1), name
    if found.request_error is not None:
        latency_us = run.requests.finish_us - run.requests.arrival_us
        if latency_us[run.requests.status == RequestStatus.COMPLETED].min() > 1000:
            assert found.request_error == pytest.approx(100 * abs(factor - 1), abs=0.1)


@few
@given(samples, samples)
def test_the_distance_of_two_samples_is_the_largest_gap(sample: np.ndarray, other: np.ndarray) -> None:
    gaps = [abs(np.mean(sample <= x) - np.mean(other <= x)) for x in (*sample, *other)]
    assert ks_distance(sample, other) == pytest.approx(max(gaps))
    assert ks_distance(sample, sample + 1000) == 1
    assert ks_distance(sample, np.array([])) is None
