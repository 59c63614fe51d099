"""Laws of metrics and run folders, over runs of every kind of request."""

import csv
import tempfile
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from record_fixtures import runs

from maveriq.domain.records import RunRecord
from maveriq.report.metrics import Figures, Metrics, summarise
from maveriq.report.reading import read_run
from maveriq.report.run_folder import write_run
from maveriq.report.saturation import assess_saturation

few = settings(max_examples=60, deadline=None)


def all_metrics(run: RunRecord) -> list[Metrics]:
    summary = summarise(run, slo_ttft_s=500.0, slo_tpot_s=1.0)
    return [summary.overall, *summary.models.values()]


@few
@given(runs())
def test_counts_add_up(run):
    overall, *models = all_metrics(run)
    assert overall.counts.scheduled == len(run.requests)
    for metrics in (overall, *models):
        scheduled, *by_status = astuple(metrics.counts)
        assert scheduled == sum(by_status)
    totals = [sum(column) for column in zip(*(astuple(m.counts) for m in models), strict=True)]
    assert totals == list(astuple(overall.counts))


@few
@given(runs())
def test_percentiles_ascend(run):
    for metrics in all_metrics(run):
        figures = [value for name in metrics.__slots__ if isinstance(value := getattr(metrics, name), Figures)]
        for each in figures:
            assert each.p50 <= each.p95 <= each.p99
            assert each.count <= metrics.counts.completed


@few
@given(runs())
def test_attainment_over_scheduled_is_at_most_that_over_completed(run):
    with_slo = run.requests.slo_us > 0
    overall = summarise(run).overall
    if overall.slo is None:
        assert not with_slo.any()
        return
    completed = (run.requests.status[with_slo] == 2).mean()
    assert overall.slo.over_scheduled <= completed
    if overall.slo.over_completed is not None:
        assert overall.slo.over_scheduled <= overall.slo.over_completed


@few
@given(runs(), st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(run, random):
    order = list(range(len(run.requests)))
    random.shuffle(order)
    columns = {name: getattr(run.requests, name)[order] for name in run.requests.__slots__ if name != "reasons"}
    shuffled = replace(run, requests=replace(run.requests, **columns))
    assert all_metrics(shuffled) == all_metrics(run)
    assert assess_saturation(shuffled) == assess_saturation(run)


@few
@given(runs())
def test_run_folders_round_trip(run):
    with tempfile.TemporaryDirectory() as scratch:
        write_run(Path(scratch) / "run", run, {}, {})
        back = read_run(Path(scratch) / "run")
        with (Path(scratch) / "run" / "requests.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    for name in run.requests.__slots__:
        assert np.array_equal(getattr(back.requests, name), getattr(run.requests, name)), name
    assert back.deployments == run.deployments
    assert all_metrics(back) == all_metrics(run)
    for row in rows:
        if row["status"] == "completed":
            queue_s, service_s, latency_s = (float(row[name]) for name in ("queue_s", "service_s", "latency_s"))
            assert abs(queue_s + service_s - latency_s) < 1e-6
            assert row["slo_met"] == ("" if not row["slo_s"] else str(int(latency_s <= float(row["slo_s"]))))
