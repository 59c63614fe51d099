"""Headline comparisons: ratios, pairs, counted loads, and the cells of the tables."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from blind_tables import csv_of, read_rows
from cases import Comparison, Variant
from headline_grids import headline_grids
from headline_pairs import COST, GPU_SECONDS, MEAN, MET_OF_ALL, THROUGHPUT, advantage, recorded_pairs, spread, winner
from headline_plan import HeadlinePlan, Load, load_headline_plan
from headline_plot import draw_headline
from headline_rows import BLIND, GRID, RECORDED, AchievedRow, achieved, judged_by
from record_fixtures import run_record, table

from maveriq.errors import UnknownNameError
from maveriq.estimate.hardware_profile import load_profile
from maveriq.scenario.build import build_system

COMMITTED = Path(__file__).parents[2] / "experiments" / "fidelity" / "headline.toml"
S = 1_000_000
PLAN = HeadlinePlan(
    slo_scale=5.0,
    judged_by=[5.0],
    even=1.0,
    contenders=["Ours"],
    baselines=["Theirs"],
    intents=["Ours fast"],
    grid=Comparison(
        model_sets=["large"],
        traces=["code"],
        scales=[0.1, 0.2],
        slo_scales=[5.0],
        estimator="paper",
        service_times="calibrated",
        policies=[
            Variant(name="Ours"),
            Variant(name="Ours fast", intent="min-latency"),
            Variant(name="Theirs", policy="alpaserve"),
        ],
    ),
)


def row(policy: str, mean_s: float | None = 1.0, **changes: object) -> AchievedRow:
    default = AchievedRow(
        source=GRID,
        run="",
        policy=policy,
        model_set="large",
        trace="code",
        scale=0.1,
        planned_slo_scale=5.0,
        slo_scale=5.0,
        scheduled=10,
        completed=10 if mean_s else 0,
        verdict="stable",
        mean_s=mean_s,
        p50_s=mean_s,
        p95_s=mean_s,
        p99_s=mean_s,
        throughput_per_s=2.0 if mean_s else None,
        cost_gib_s=mean_s and 3 * mean_s,
        gpu_hours=1.0,
        met_of_completed=90.0 if mean_s else None,
        met_of_scheduled=90.0,
    )
    return replace(default, **changes)


def grid_of(name: str, rows: list[AchievedRow]) -> list[list[str]]:
    return [list(cells) for grid in headline_grids(rows, PLAN) if grid.name == name for cells in grid.rows]


def test_larger_is_better_or_worse_depending_on_the_measure() -> None:
    pair = row("Ours", 2.0, gpu_hours=1.0), row("Theirs", 3.0, gpu_hours=1.0, completed=5, throughput_per_s=1.0)
    assert advantage(MEAN, pair) == pytest.approx(1.5)
    assert advantage(COST, pair) == pytest.approx(1.5)
    assert advantage(THROUGHPUT, pair) == pytest.approx(2)
    assert advantage(GPU_SECONDS, pair) == pytest.approx(2)  # the same hours for half of the requests
    assert advantage(MET_OF_ALL, (row("Ours"), row("Theirs", met_of_scheduled=95.0))) == pytest.approx(-5)
    assert advantage(MEAN, (row("Ours"), row("Theirs", None))) is None


@pytest.mark.parametrize(
    ("found", "of_ratio", "of_points"),
    [(1.5, 1, 1), (1.005, 0, 1), (0.995, 0, 0), (0.9, -1, 0), (-1.5, -1, -1)],
)
def test_ties_have_no_winner(found: float, of_ratio: int, of_points: int) -> None:
    assert winner(MEAN, found, 1.0) == of_ratio
    assert winner(MET_OF_ALL, found, 1.0) == of_points


def test_ratios_have_a_geometric_and_points_an_arithmetic_mean() -> None:
    pairs = [(row("Ours", 1.0), row("Theirs", slow, met_of_scheduled=met)) for slow, met in ((2.0, 80.0), (8.0, 60.0))]
    ratios, points = spread(MEAN, pairs), spread(MET_OF_ALL, pairs)
    assert ratios
    assert (ratios.count, ratios.mean, ratios.low, ratios.high) == (2, pytest.approx(4), 2, 8)
    assert points
    assert (points.mean, points.low, points.high) == (20, 10, 30)
    assert spread(MEAN, [(row("Ours"), row("Theirs", None))]) is None


def recording(run: str, policy: str, *, mean_s: float, sim_mean_s: float, planned: float) -> list[AchievedRow]:
    return [
        row(policy, seconds, source=source, run=run, planned_slo_scale=planned, slo_scale=slo_scale)
        for source, seconds in ((RECORDED, mean_s), (BLIND, sim_mean_s))
        for slo_scale in (2.5, 5.0)
    ]


def test_recorded_runs_are_paired_under_one_load_and_judged_by_one_slo() -> None:
    rows = [
        *recording("b", "Theirs", mean_s=6.0, sim_mean_s=6.6, planned=2.5),
        *recording("a", "Ours", mean_s=2.0, sim_mean_s=2.0, planned=0.0),
        *recording("c", "Ours fast", mean_s=1.0, sim_mean_s=1.0, planned=0.0),
        *(replace(pair, scale=0.2) for pair in recording("d", "Theirs", mean_s=1.0, sim_mean_s=1.0, planned=5.0)),
    ]
    pairs = list(recorded_pairs(rows, PLAN))
    assert [(ours.run, theirs.run) for ours, theirs in (pair.recorded for pair in pairs)] == [
        ("a", "c"), ("a", "b"), ("c", "b"),
    ]  # fmt: skip
    assert [pair.recorded[0].slo_scale for pair in pairs] == [5.0, 2.5, 2.5]  # the other's, else the plan's
    assert pairs[1].both(MEAN) == (pytest.approx(3.0), pytest.approx(3.3))
    lines = grid_of("headline recorded", rows)
    assert lines[1][:5] == ["large code 0.1, SLO 2.5", "Ours", "Theirs", "100 / 100", "3.00 / 3.30"]
    assert lines[0][4] == "**0.50** / **0.50**"  # bold where it loses
    means = grid_of("headline ratios", rows)[0]
    assert means[:2] == ["mean latency", "3"]
    assert means[2] == "2.08 (0.50 to 6.00)"  # the cube root of 0.5 x 3 x 6
    assert means[4:] == ["10.0 %", "+10.0 %", "3 of 3"]


def test_overloaded_runs_count_for_shares_and_throughput_only() -> None:
    rows = [
        row("Ours", 2.0),
        row("Theirs", 8.0, throughput_per_s=1.0),
        row("Ours fast", 1.0),
        row("Ours", 2.0, scale=0.2),
        row("Theirs", 500.0, scale=0.2, verdict="overloaded", throughput_per_s=0.5, met_of_scheduled=10.0),
        row("Ours fast", 4.0, scale=0.2),
    ]
    assert grid_of("headline large", rows) == [
        ["Ours", "Theirs", "1 of 2", "4.00 (4.00 to 4.00)", "4.00 (4.00 to 4.00)", "2.83 (2.00 to 4.00)",
         "4.00 (4.00 to 4.00)", "1.00 (1.00 to 1.00)", "1.00 (1.00 to 1.00)"],
    ]  # fmt: skip
    assert grid_of("headline intents", rows)[0][2:4] == ["2 of 2", "1.00 (0.50 to 2.00)"]
    assert grid_of("headline attainment", rows)[2] == ["Theirs", "50.0 (90.0)"]
    assert grid_of("headline losses", rows) == []


def test_losses_are_listed() -> None:
    rows = [row("Ours", 2.0, gpu_hours=4.0), row("Theirs", 1.8, met_of_scheduled=95.0), row("Ours fast")]
    ((_, ours, theirs, lost),) = grid_of("headline losses", rows)
    assert (ours, theirs) == ("Ours", "Theirs")
    assert lost.startswith("mean latency 1 of 1 (0.90), p50 1 of 1 (0.90), ")
    assert lost.endswith("GPU-hours 1 of 1 (0.25), GPU s of a request 1 of 1 (0.25), SLO of all 1 of 1 (-5.0)")


def test_figures_of_a_run() -> None:
    requests = table(
        [
            [1, 1, 1, 0, 0, -1, 2 * S, 2, 0, 10, 20, 0],
            [2, 1, 1, 10 * S, 12 * S, -1, 14 * S, 2, 0, 10, 20, 0],
            [3, 1, 1, 20 * S, -1, -1, -1, 5, 0, 10, 20, 0],
        ]
    )
    profile = load_profile("a6000-short")
    run = run_record(requests, models={1: "llama-2-7b"}, ended_us=99 * S)
    slo_s = profile.slo_s("llama-2-7b", 20)
    assert slo_s
    row = achieved(
        judged_by(run, 3 / slo_s, profile),
        source=GRID,
        run="",
        policy="Ours",
        load=Load(model_set="large", trace="code", scale=0.1),
        planned_slo_scale=0.0,
        slo_scale=3 / slo_s,
    )
    assert (row.scheduled, row.completed) == (3, 2)
    assert (row.mean_s, row.cost_gib_s) == (pytest.approx(3), pytest.approx(3 * 6))  # two GPUs with 3 GiB each
    assert row.gpu_hours == pytest.approx(2 * 4 / 3600)
    assert row.gpu_s_of_a_request == pytest.approx(4)
    assert row.throughput_per_s == pytest.approx(2 / 14)
    assert (row.met_of_completed, row.met_of_scheduled) == (pytest.approx(50), pytest.approx(100 / 3))


def test_rows_round_trip(tmp_path: Path) -> None:
    rows = [row("Ours", 0.25, scale=0.15), row("Theirs", None)]
    (tmp_path / "rows.csv").write_text(csv_of(AchievedRow, rows))
    assert list(read_rows(tmp_path / "rows.csv", AchievedRow)) == rows


def test_policies_are_compared_under_the_same_requests() -> None:
    plan = load_headline_plan(COMMITTED)
    seen = []
    for case in plan.grid.cases():
        if (case.model_set, case.trace, case.scale) == ("regular", "code", 0.1):
            options = case.options()
            assert (options.estimator, options.service_times) == ("paper", "calibrated")
            seen.append(build_system(options).workload.arrivals)
    assert len(seen) == len(plan.grid.policies)
    for arrivals in seen[1:]:
        for column in ("arrival_us", "endpoint_id", "prompt_tokens", "output_tokens", "slo_us"):
            assert np.array_equal(getattr(arrivals, column), getattr(seen[0], column))


def test_an_unknown_policy_of_the_grid_is_named(tmp_path: Path) -> None:
    text = COMMITTED.read_text(encoding="utf-8").replace(
        'intents = ["MaverIQ min-latency"', 'intents = ["MaverIQ fast"'
    )
    (tmp_path / "headline.toml").write_text(text)
    with pytest.raises(UnknownNameError, match="MaverIQ fast"):
        load_headline_plan(tmp_path / "headline.toml")


@pytest.mark.heavy
@pytest.mark.parametrize("recorded", [False, True])
def test_the_picture_works_with_and_without_recordings(tmp_path: Path, *, recorded: bool) -> None:
    rows = [row("Ours"), row("Theirs", 2.0), row("Ours fast")]
    for policy in ("Ours", "Theirs") if recorded else ():
        rows += recording(policy, policy, mean_s=1.0, sim_mean_s=1.1, planned=0.0)
    draw_headline(tmp_path / "headline.png", rows, PLAN)
    assert (tmp_path / "headline.png").read_bytes().startswith(b"\x89PNG")
