"""Metrics against figures computed by hand."""

from dataclasses import replace

import numpy as np
import pytest
from fixtures import arrivals, run
from record_fixtures import deployment, run_record, single_server, table

from maveriq.domain.records import NOT_YET, GpuSample
from maveriq.errors import InvariantError
from maveriq.report.metrics import Attainment, busiest_gpu, gpu_use, summarise
from maveriq.report.run_folder import summary_to_json
from maveriq.report.saturation import assess_saturation
from maveriq.units import BYTES_PER_GIB, micros

S = 1_000_000
COMPLETED, REFUSED, FAILED, UNFINISHED = 2, 3, 4, 5
# id, endpoint, deployment, arrival, start, first token, finish, status, reason, prompt, output, SLO
ROWS = [
    [1, 1, 1, 0, 0, 1 * S, 3 * S, COMPLETED, 0, 10, 5, 3 * S],
    [2, 1, 1, 1 * S, 3 * S, 4 * S, 6 * S, COMPLETED, 0, 10, 1, 4 * S],
    [3, 1, 0, 2 * S, NOT_YET, NOT_YET, NOT_YET, REFUSED, 1, 10, 5, 4 * S],
    [4, 1, 1, 3 * S, 6 * S, NOT_YET, 7 * S, FAILED, 2, 10, 5, 4 * S],
    [5, 1, 1, 4 * S, NOT_YET, NOT_YET, NOT_YET, UNFINISHED, 0, 10, 5, 0],
]


def test_figures_of_a_small_run():
    overall = summarise(run_record(table(ROWS))).overall
    assert overall.counts.scheduled == 5
    assert (overall.counts.completed, overall.counts.refused) == (2, 1)
    assert (overall.counts.failed, overall.counts.unfinished) == (1, 1)
    assert overall.latency_s.mean == pytest.approx(4.0)
    assert overall.latency_s.p50 == pytest.approx(4.0)
    assert overall.latency_s.p95 == pytest.approx(4.9)
    assert overall.queue_s.mean == pytest.approx(1.0)
    assert overall.service_s.mean == pytest.approx(3.0)
    assert overall.ttft_s.mean == pytest.approx(2.0)
    assert overall.throughput_per_s == pytest.approx(2 / 6)


def test_tpot_is_left_out_under_two_tokens():
    tpot = summarise(run_record(table(ROWS))).overall.tpot_s
    assert tpot.count == 1
    assert tpot.mean == pytest.approx((3 - 1) / (5 - 1))


def test_cost_and_gpu_hours_follow_the_deployment():
    overall = summarise(run_record(table(ROWS), deployments=[deployment(1, gpu_ids=(0, 1), gib_per_gpu=3.0)])).overall
    assert overall.cost_gib_s.mean == pytest.approx(4.0 * 6.0)
    assert overall.gpu_hours.mean == pytest.approx(3.0 * 2 / 3600)
    assert overall.operational_cost_gpu_hours == pytest.approx(6.0 * 2 / 3600)


def test_requests_that_did_not_complete_miss_their_slo():
    slo = summarise(run_record(table(ROWS))).overall.slo
    assert slo == Attainment(over_completed=1 / 2, over_scheduled=1 / 4)


def test_without_an_slo_there_is_no_attainment():
    rows = [[*row[:-1], 0] for row in ROWS]
    assert summarise(run_record(table(rows))).overall.slo is None


def test_goodput_counts_ttft_from_arrival():
    run = run_record(table(ROWS))
    # The first token of the second request comes 1 s after its start and 3 s after its arrival.
    assert summarise(run, slo_ttft_s=1.0).overall.goodput.share == pytest.approx(1 / 5)
    assert summarise(run, slo_ttft_s=3.0).overall.goodput.share == pytest.approx(2 / 5)
    assert summarise(run, slo_ttft_s=3.0).overall.goodput.per_s == pytest.approx(2 / 6)
    # The second has one token and therefore no TPOT; the first has a TPOT of 0.5 s.
    assert summarise(run, slo_tpot_s=0.4).overall.goodput.share == pytest.approx(1 / 5)
    assert summarise(run, slo_tpot_s=0.5).overall.goodput.share == pytest.approx(2 / 5)
    assert summarise(run).overall.goodput is None


def test_endpoints_of_one_model_count_together():
    rows = [[*row[:1], 1 + i % 3, *row[2:]] for i, row in enumerate(ROWS)]
    summary = summarise(run_record(table(rows), models={1: "tiny", 2: "big", 3: "tiny"}))
    assert list(summary.models) == ["tiny", "big"]
    assert summary.models["tiny"].counts.scheduled == 3
    assert summary.models["big"].counts.scheduled == 2


def test_a_run_without_requests_has_no_figures():
    overall = summarise(run_record(table([])), slo_ttft_s=1.0).overall
    assert overall.counts.scheduled == 0
    assert (overall.latency_s, overall.slo, overall.goodput, overall.throughput_per_s) == (None, None, None, None)


def test_a_lost_request_is_a_bug():
    rows = [[*ROWS[0][:7], 1, *ROWS[0][8:]]]
    with pytest.raises(InvariantError, match="some were lost"):
        summarise(run_record(table(rows)))


def sample(at_s: float, gpu_id: int, gib: float, busy: float) -> GpuSample:
    return GpuSample(time_us=micros(at_s), gpu_id=gpu_id, memory_bytes=int(gib * BYTES_PER_GIB), busy_share=busy)


def test_gpu_use_is_weighted_by_time():
    samples = [sample(1, 0, 10, 1.0), sample(1, 1, 2, 1.0), sample(4, 0, 20, 0.5), sample(4, 1, 2, 0.0)]
    use = gpu_use(samples)
    assert use.mean_gpus == pytest.approx((1 * 2 + 3 * 0.5) / 4)
    assert use.peak_gpus == pytest.approx(2.0)
    assert use.mean_memory_gib == pytest.approx((1 * 12 + 3 * 22) / 4)
    assert use.peak_memory_gib == pytest.approx(22.0)
    assert busiest_gpu(samples, until_us=micros(4)) == (0, pytest.approx(2.5 / 4))
    assert busiest_gpu(samples, until_us=micros(1)) == (0, pytest.approx(1.0))


def test_without_samples_gpu_use_is_unknown():
    assert gpu_use([]) is None
    assert busiest_gpu([], until_us=1) is None
    assert gpu_use([sample(0, 0, 4, 0.0)]).mean_memory_gib == pytest.approx(4.0)


def test_a_large_run_is_summarised_by_columns():
    gaps = np.random.default_rng(1).exponential(1.0, 20_000)
    run = single_server(gaps, np.full(20_000, 0.5))
    overall = summarise(run).overall
    latency_s = (run.requests.finish_us - run.requests.arrival_us) / 1e6
    assert overall.latency_s.p99 == pytest.approx(np.percentile(latency_s, 99))
    assert overall.latency_s.mean == pytest.approx(latency_s.mean())


def test_summary_in_plain_values():
    run = run_record(table(ROWS), deployments=[deployment(1, note="misses its SLO")])
    run = replace(run, requests=run.requests)
    summary = summary_to_json(summarise(run), assess_saturation(run), run.deployments)
    assert summary["saturation"]["label"] == "stable"
    assert summary["overall"]["counts"]["scheduled"] == 5
    assert summary["overall"]["goodput"] is None
    assert summary["deployments"][0]["reason"] == "misses its SLO"
    assert summary["deployments"][0]["configuration"]["tp"] == 2


def test_a_batch_shares_the_gpu_hours_of_its_execution() -> None:
    """Three requests on one GPU: one alone for 2 s, then two together for 4 s; the GPU is busy for 6 s."""
    record = run(arrivals([10, 11, 12], [1, 1, 1], [2_000, 4_000, 1_000]), {1: [(0,)]}, gpus=1, batch_size=2)
    gpu_hours = summarise(record).overall
    assert gpu_hours.operational_cost_gpu_hours == pytest.approx(6 / 3600)
    assert gpu_hours.gpu_hours.count == 3
