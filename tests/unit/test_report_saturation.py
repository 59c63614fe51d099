"""Saturation of single-server queues with known behaviour."""

from dataclasses import replace

import numpy as np
import pytest
from record_fixtures import run_record, single_server, table

from maveriq.domain.records import NOT_YET, GpuSample, RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.report.saturation import Saturation, SaturationLabel, assess_saturation, queue_of
from maveriq.units import micros

STABLE, BACKLOGGED, OVERLOADED = SaturationLabel.STABLE, SaturationLabel.BACKLOGGED, SaturationLabel.OVERLOADED


def m_d_1(load: float, requests: int, *, seed: int = 0, pauses: tuple = ()) -> RunRecord:
    """Return Poisson arrivals at `load` per second with a service time of one second."""
    gaps_s = np.random.default_rng(seed).exponential(1 / load, requests)
    return single_server(gaps_s, np.ones(requests), pauses=pauses)


def stages(*loads_and_seconds: tuple[float, float]) -> RunRecord:
    """Return Poisson arrivals with a rate per stage and a service time of one second."""
    random = np.random.default_rng(0)
    arrivals_s, since_s = [], 0.0
    for load, span_s in loads_and_seconds:
        arrivals_s.append(np.sort(since_s + random.uniform(0, span_s, round(load * span_s))))
        since_s += span_s
    gaps_s = np.diff(np.concatenate(arrivals_s), prepend=0.0)
    return single_server(gaps_s, np.ones(len(gaps_s)))


def labels(load: float, requests: int, *, seeds: int = 20) -> list[SaturationLabel]:
    return [assess_saturation(m_d_1(load, requests, seed=seed)).label for seed in range(seeds)]


@pytest.mark.parametrize("requests", [50, 200, 2000])
def test_half_load_is_stable(requests):
    assert labels(0.5, requests) == [STABLE] * 20


@pytest.mark.parametrize("requests", [50, 200, 2000])
def test_high_load_is_stable_but_for_rare_chance(requests):
    assert labels(0.9, requests).count(STABLE) >= 18


def test_varying_service_times_are_no_backlog():
    random = np.random.default_rng(5)
    runs = [single_server(random.exponential(1 / 0.9, 1000), random.exponential(1.0, 1000)) for _ in range(20)]
    assert [assess_saturation(run).label for run in runs].count(STABLE) >= 18


@pytest.mark.parametrize("requests", [500, 2000])
def test_more_than_it_can_serve_is_overloaded(requests):
    assert labels(1.3, requests) == [OVERLOADED] * 20


def test_a_slight_overload_shows_in_a_long_run():
    assert assess_saturation(m_d_1(1.05, 20_000)).label is OVERLOADED


def test_a_short_run_at_twice_the_load_is_overloaded():
    assert labels(2.0, 50).count(OVERLOADED) >= 19


def test_overload_is_stated_with_its_numbers():
    saturation = assess_saturation(m_d_1(1.3, 2000))
    assert saturation.evidence.drift_share == pytest.approx(1 - 1 / 1.3, abs=0.06)
    assert saturation.evidence.left_waiting == pytest.approx(2000 * (1 - 1 / 1.3), rel=0.2)
    assert f"{saturation.evidence.left_waiting - 1:,} still waited" in saturation.sentence  # without the last arrival


def test_a_burst_that_drains_is_backlogged():
    saturation = assess_saturation(stages((0.5, 600), (2.0, 200), (0.5, 1200)))
    assert saturation.label is BACKLOGGED
    # 200 more arrive in the burst than can be served; half of the capacity is then left to drain them.
    assert saturation.evidence.worst_backlog_s == pytest.approx(600, rel=0.2)
    assert saturation.evidence.peak_waiting == pytest.approx(200, rel=0.15)


def test_repeated_bursts_add_up():
    high_and_low = [(1.6, 100), (0.4, 400)] * 6
    assert assess_saturation(stages(*high_and_low)).label is BACKLOGGED


def test_a_burst_at_the_very_end_is_no_overload():
    assert assess_saturation(stages((0.5, 1900), (3.0, 100))).label is BACKLOGGED


def test_pauses_after_deploys_that_drain_at_once_are_minor():
    pauses = tuple((since_s, since_s + 10.0) for since_s in (100.0, 400.0, 700.0, 1000.0))
    gaps_s = np.random.default_rng(3).exponential(0.2, 9000)
    paused = single_server(gaps_s, np.full(9000, 0.1), pauses=pauses)
    saturation = assess_saturation(paused)
    assert saturation.label is STABLE
    assert saturation.evidence.peak_waiting > 30
    assert saturation.evidence.worst_backlog_s == pytest.approx(20, rel=0.4)


def test_a_pause_in_a_short_run_is_minor():
    assert assess_saturation(m_d_1(0.5, 50, pauses=((40.0, 50.0),))).label is STABLE


def test_all_at_once_is_backlogged():
    run = single_server(np.array([1.0] + [0.0] * 99), np.ones(100))
    assert assess_saturation(run).label is BACKLOGGED
    assert assess_saturation(run).evidence.worst_backlog_s == pytest.approx(99, rel=0.01)


def test_a_constant_dispatch_delay_is_stable():
    run = m_d_1(0.5, 5000)
    delayed = replace(run, requests=replace(run.requests, start_us=run.requests.start_us + micros(8.0)))
    assert assess_saturation(delayed).label is STABLE


def test_the_order_of_rows_does_not_matter():
    run = m_d_1(1.3, 500)
    order = np.random.default_rng(0).permutation(500)
    columns = {name: getattr(run.requests, name)[order] for name in run.requests.__slots__ if name != "reasons"}
    assert assess_saturation(replace(run, requests=replace(run.requests, **columns))) == assess_saturation(run)


def test_refused_requests_never_wait_and_unfinished_ones_wait_to_the_end():
    s = 1_000_000
    status = RequestStatus
    refused = [1, 1, 0, 1 * s, NOT_YET, NOT_YET, NOT_YET, status.REFUSED.value, 1, 5, 5, 0]
    unfinished = [2, 1, 0, 2 * s, NOT_YET, NOT_YET, NOT_YET, status.UNFINISHED.value, 0, 5, 5, 0]
    failed = [3, 1, 0, 3 * s, NOT_YET, NOT_YET, 4 * s, status.FAILED.value, 0, 5, 5, 0]
    later = [4, 1, 1, 9 * s, 9 * s, 9 * s, 10 * s, status.COMPLETED.value, 0, 5, 5, 0]
    queue = queue_of(run_record(table([refused, unfinished, failed, later]), ended_us=20 * s))
    assert queue.peak == 2
    assert queue.left == 1
    assert queue.drained_us == 20 * s


def test_no_request_or_only_refused_ones():
    assert assess_saturation(run_record(table([]))).label is STABLE
    assert assess_saturation(run_record(table([]))).evidence is None
    single = assess_saturation(run_record(table([[1, 1, 1, 5, 5, 6, 7, 2, 0, 5, 5, 0]])))
    assert single.label is STABLE


def test_saturation_per_model():
    run = m_d_1(1.3, 1000)
    late = replace(run.requests, endpoint_id=np.where(np.arange(1000) < 20, 2, 1))
    run = replace(run, requests=late, models={1: "tiny", 2: "big"})
    assert assess_saturation(run, model="tiny").label is OVERLOADED
    assert assess_saturation(run, model="big").label is not OVERLOADED
    assert isinstance(assess_saturation(run, model="unheard of"), Saturation)


def test_the_busiest_gpu_is_named():
    run = m_d_1(0.5, 50)
    samples = tuple(
        GpuSample(time_us=micros(t), gpu_id=gpu, memory_bytes=1, busy_share=share)
        for t in (10, 20)
        for gpu, share in ((0, 0.2), (3, 0.8))
    )
    saturation = assess_saturation(replace(run, gpu_samples=samples))
    assert (saturation.evidence.busiest_gpu, saturation.evidence.busiest_gpu_share) == (3, pytest.approx(0.8))
    assert "The busiest GPU, 3, worked 80.0 % of the time." in saturation.sentence


def test_the_sentence_names_refused_requests():
    from fixtures import arrivals, run

    half = run(arrivals([10, 20], [1, 2], [5, 5]), {1: [(0,)], 2: []})
    assert assess_saturation(half).sentence.endswith("1 of 2 requests were refused and count for nothing here.")
    all_refused = run(arrivals([10, 20], [1, 2], [5, 5]), {1: [], 2: []})
    assert assess_saturation(all_refused).sentence == "No request was served: all were refused."
