"""The committed blind runs equal the results of the code, and the page shows them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from blind import PICTURES, page_grids
from blind_grids import grids
from blind_placement import placement_rows
from blind_plan import load_blind_plan
from blind_rows import BlindRow, ServiceRow
from blind_runs import PROFILE, blind_results, unseen
from blind_tables import allowed, csv_of, held, missed, read_tables, write_tables
from page import filled

from maveriq.domain.models import WeightType, load_model
from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.calibrated import CalibratedEstimator
from maveriq.estimate.hardware_profile import load_profile
from maveriq.testbed.recordings import find_testbed, read_runs

ROOT = Path(__file__).parents[2]
HERE = ROOT / "experiments" / "fidelity"
STALE = "run experiments/fidelity/blind.py and look at what changed"
PLAN = load_blind_plan(HERE / "blind.toml")
AGAIN = (
    "AlpaServe_large_None_code_0.1_slo5",  # has replicas, and a model without deployment
    "AlpaServe-star_large_None_code_0.1_slo5",
    "MaverIQ_large_min_lat_code_0.1_slo0",
)


@pytest.mark.heavy
@pytest.mark.data
def test_runs_equal_the_committed_results(measured_data: Path) -> None:
    committed = read_tables(HERE / "results")
    found = list(blind_results(measured_data, PLAN, names=AGAIN))
    assert {result.row.run for result in found} == set(AGAIN)
    for result in found:
        rows = [row for row in committed.runs if row.run == result.row.run]
        services = [row for row in committed.services if row.run == result.row.run]
        assert csv_of(BlindRow, [result.row]) == csv_of(BlindRow, rows), STALE
        assert csv_of(ServiceRow, result.services) == csv_of(ServiceRow, services), STALE
        assert not result.comparison.unmatched  # all requests match: the same models at the same times


@pytest.mark.data
def test_every_recorded_run_has_a_row(measured_data: Path) -> None:
    assert [run.name for run in read_runs(find_testbed(measured_data))] == [
        row.run for row in read_tables(HERE / "results").runs
    ]


def test_runs_outside_the_fit_can_be_simulated() -> None:
    profile = load_profile(PROFILE)
    default = CalibratedEstimator.serving(profile)
    model, configuration = load_model("llama-2-7b"), ParallelConfig(tp=2, pp=1, weights=WeightType.INT8)

    def service_s(estimator: CalibratedEstimator) -> float:
        estimate = estimator.service(model, configuration, prompt_tokens=100, output_tokens=20, batch=1)
        return estimate.latency_s

    assert service_s(unseen("recorded-elsewhere", profile)) == service_s(default)
    assert service_s(unseen(AGAIN[0], profile)) != service_s(default)


def test_one_run_is_enough_for_a_page(tmp_path: Path) -> None:
    every = read_tables(HERE / "results")
    row = next(row for row in every.runs if row.slo_error is None)  # without an SLO
    services = [service for service in every.services if service.run == row.run]
    write_tables(tmp_path, replace(every, runs=[row], services=services, elsewhere=[], gains=[], contention=[]))
    tables = read_tables(tmp_path)
    assert not tables.contention
    assert not any("SLO" in bar.what for bar in held(tables, PLAN.bars))
    assert list(grids(tables, PLAN))


def test_the_page_shows_the_results() -> None:
    text = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    tables = page_grids(HERE / "results", PLAN)
    assert filled(text, tables) == text, STALE
    assert set(re.findall("<!-- table: (.*) -->", text)) == {table.name for table in tables}


def test_every_run_has_its_picture() -> None:
    gallery = (HERE / "results" / PICTURES / "README.md").read_text(encoding="utf-8")
    for row in read_tables(HERE / "results").runs:
        assert f"({row.run}.png)" in gallery
        assert (HERE / "results" / PICTURES / f"{row.run}.png").is_file(), STALE


def test_bars_depend_on_the_run() -> None:
    rows = read_tables(HERE / "results").runs
    for row in rows:
        busy = row.busiest_percent >= 85
        mean, p95 = allowed(row, PLAN.bars)
        assert mean >= (25 if busy else 10)
        assert p95 >= (25 if busy else 15)
        assert ("mean" in missed(row, PLAN.bars)) == (abs(row.mean_error) > mean)
    bars = list(held(read_tables(HERE / "results"), PLAN.bars))
    assert bars[0].found == f"{sum('mean' not in missed(row, PLAN.bars) for row in rows)} runs"
    assert all(bar.holds for bar in bars)


@pytest.mark.heavy
@pytest.mark.data
def test_recorded_placements_vary_over_draws_but_are_reachable(measured_data: Path) -> None:
    in_step, *out_of_step = placement_rows(measured_data, load_profile(PROFILE), draws=20)
    assert in_step.always + in_step.never == in_step.deployments == 61
    for row in out_of_step:
        assert row.expected >= in_step.expected - 1
        assert row.never < in_step.never
