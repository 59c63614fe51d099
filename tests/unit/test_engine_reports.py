"""Records of continuous engines in files, summaries, comparisons, plots and the live view."""

import csv
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from record_fixtures import deployment, run_record, table
from test_report_live import DEPLOYMENT, PROGRESS, drawn

from maveriq.domain.deployments import Batching
from maveriq.domain.records import ENGINE_COLUMNS, ITL_COLUMNS, EngineTable, ItlTable, RunRecord
from maveriq.errors import InputError
from maveriq.report import reading
from maveriq.report.compare import compare
from maveriq.report.compare_many import compare_many, many_view
from maveriq.report.compare_view import comparison_view
from maveriq.report.engine_plot import MAX_LINES, PANELS, STYLES
from maveriq.report.formatting import ASCII
from maveriq.report.frames import engines_frame
from maveriq.report.metrics import summarise
from maveriq.report.reading import read_run
from maveriq.report.results import summary_tables
from maveriq.report.run_folder import write_run
from maveriq.report.run_labels import UNNAMED
from maveriq.report.run_plot import run_figure

COMPLETED = 2


def engine_table(engines: int, rows: int = 40) -> EngineTable:
    """Return engines that are idle in every fifth interval of a second."""
    time_us = np.repeat(np.arange(1, rows + 1) * 1_000_000, engines)
    deployment_id = np.tile(np.arange(1, engines + 1), rows)
    busy = time_us // 1_000_000 % 5 != 0
    load = np.where(busy, deployment_id / engines, 0.0)
    return EngineTable(
        time_us=time_us,
        deployment_id=deployment_id,
        running=4 * load,
        waiting=load / 3,
        kv_use=load / 2,
        batch_tokens=np.where(busy, 100 * load, np.nan),
        step_us=np.where(busy, 7_000 + load, np.nan),
        busy_share=np.where(busy, 0.9, 0.0),
    )


def engine_run(
    engines: int = 2, *, gaps: tuple[tuple[int, int, int], ...] = ((1, 7_000, 3), (1, 9_000, 2))
) -> RunRecord:
    """Return a run of two requests with the given inter-token latencies: endpoint, µs, tokens."""
    requests = table(
        [
            [1, 1, 1, 0, 10, 50_000, 80_000, COMPLETED, 0, 100, 5, 0, 25, 1, 6],
            [2, 1, 2, 5, 20, 60_000, 90_000, COMPLETED, 0, 300, 3, 0, 0, 0, 3],
        ]
    )
    endpoint_id, itl_us, tokens = (np.array(column, dtype=np.int64) for column in zip(*gaps, strict=True))
    run = run_record(requests, deployments=[deployment(number) for number in range(1, engines + 1)])
    itl = ItlTable(endpoint_id=endpoint_id, itl_us=itl_us, tokens=tokens)
    return replace(run, engines=engine_table(engines), itl=itl)


def columns(of: EngineTable | ItlTable) -> dict[str, np.ndarray]:
    return {name: getattr(of, name) for name in of.__slots__}


@pytest.mark.parametrize("by_column", [True, False])
def test_a_run_folder_keeps_engines_and_latencies(tmp_path: Path, by_column, monkeypatch) -> None:
    run = engine_run()
    write_run(tmp_path / "run", run, {}, {})
    if not by_column:
        monkeypatch.setattr(reading, "_arrow_table", lambda *_, **__: None)
    read = read_run(tmp_path / "run")
    assert read.engines is not None
    assert read.itl is not None
    for name, column in columns(run.engines).items():
        assert getattr(read.engines, name) == pytest.approx(column, abs=0.6, nan_ok=True), name
    for name, column in columns(run.itl).items():
        assert getattr(read.itl, name).tolist() == column.tolist(), name
    assert read.requests.steps.tolist() == [6, 3]


def test_tables_have_their_columns_and_empty_cells_where_no_step_ran(tmp_path: Path) -> None:
    write_run(tmp_path / "run", engine_run(), {}, {})
    with (tmp_path / "run" / "engines.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == ENGINE_COLUMNS
    assert rows[0] == {
        "time_s": "1.000000", "deployment_id": "1", "running": "2.000000", "waiting": "0.166667", "kv_use": "0.250000",
        "batch_tokens": "50.000000", "step_s": "0.007000", "busy_share": "0.900000",
    }  # fmt: skip
    idle = next(row for row in rows if row["time_s"] == "5.000000")
    assert (idle["batch_tokens"], idle["step_s"], idle["running"]) == ("", "", "0.000000")
    itl = (tmp_path / "run" / "itl.csv").read_text().splitlines()
    assert itl == [",".join(ITL_COLUMNS), "1,0.007000,3", "1,0.009000,2"]
    assert list(engines_frame(engine_run()).columns) == list(ENGINE_COLUMNS)


def test_runs_of_other_engines_have_neither(tmp_path: Path) -> None:
    run = replace(engine_run(), engines=None, itl=None)
    write_run(tmp_path / "run", run, {}, {})
    assert not list((tmp_path / "run").glob("engines.csv")) + list((tmp_path / "run").glob("itl.csv"))
    read = read_run(tmp_path / "run")
    assert (read.engines, read.itl) == (None, None)
    assert summarise(run).overall.itl_s is None
    assert len(engines_frame(run)) == 0


@pytest.mark.parametrize(
    ("name", "old", "new", "line"),
    [
        ("engines.csv", "0.250000", "-1", 2),
        ("engines.csv", "0.250000", "", 2),
        ("engines.csv", "2.000000,1,", "x,1,", 4),
        ("itl.csv", "1,0.007000", "0,0.007000", 2),
        ("itl.csv", "0.009000,2", "0.009000,0", 3),
    ],
)
def test_wrong_cells_are_refused_with_their_line(tmp_path: Path, name, old, new, line) -> None:
    write_run(tmp_path / "run", engine_run(), {}, {})
    path = tmp_path / "run" / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=rf"{name}', line {line}"):
        read_run(tmp_path / "run")


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 50_000), st.integers(1, 400)), min_size=1, max_size=40))
def test_percentiles_of_latencies_are_those_of_all_of_them(gaps) -> None:
    run = engine_run(gaps=tuple(gaps))
    for endpoints, found in (([1, 2, 3], summarise(run).overall.itl_s), ([1], summarise(run).models["tiny"].itl_s)):
        every = np.array([itl_us for endpoint, itl_us, tokens in gaps for _ in range(tokens) if endpoint in endpoints])
        if not len(every):
            assert found is None
            continue
        assert found is not None
        assert found.count == len(every)
        assert found.mean == pytest.approx(every.mean() / 1e6)
        assert (found.p50, found.p95, found.p99) == pytest.approx(np.percentile(every, (50, 95, 99)) / 1e6)


def test_the_summary_counts_preemptions_and_cached_tokens() -> None:
    overall = summarise(engine_run()).overall
    assert overall.preemptions == 1
    assert overall.cached_share == pytest.approx(25 / 400)
    headers = [
        column.header
        for part in summary_tables(summarise(engine_run()), wide=True, width=200)
        for column in part.columns
    ]
    assert "ITL ms\np50" in headers
    assert "pre-\nempted" in headers


def test_a_comparison_shows_what_only_continuous_engines_have() -> None:
    run, slower = engine_run(), engine_run(gaps=((1, 14_000, 3), (1, 18_000, 2)))
    differences = compare(slower, run).overall.differences
    assert differences["itl-mean"].error == pytest.approx(100)
    assert differences["itl-p99"].sim == pytest.approx(18)
    assert differences["ttft-mean"].error == pytest.approx(0)
    assert differences["cached"].sim == pytest.approx(25 / 400)
    assert differences["preemptions"].real == 1
    text = str(comparison_view(compare(slower, run), width=160))
    assert text
    other = replace(run, engines=None, itl=None)
    lacking = compare(other, other).overall.differences
    assert all(lacking[name].sim is None for name in ("itl-mean", "cached", "preemptions"))
    assert many_view(compare_many([run, slower, run], [*UNNAMED, UNNAMED[0]]))


@pytest.mark.parametrize("engines", [1, MAX_LINES, MAX_LINES + 3])
def test_a_figure_has_a_panel_for_each_quantity(engines: int) -> None:
    figure = run_figure(engine_run(engines), title="a run")
    latency, *panels = figure.axes
    assert latency.get_ylabel() == "latency, s"
    assert [axes.get_ylabel() for axes in panels] == [panel.label for panel in PANELS]
    drawn_lines = len(panels[0].get_lines())
    assert drawn_lines == (engines if engines <= MAX_LINES else 1)
    assert np.nanmax(panels[0].get_lines()[-1].get_ydata()) > 0
    assert np.isnan(panels[-1].get_lines()[0].get_ydata()).any()  # idle: no step has a time


def test_lines_differ_in_more_than_colour() -> None:
    assert len({str(dashes) for _, dashes in STYLES}) == len(STYLES) == MAX_LINES


def test_the_live_view_shows_what_engines_hold() -> None:
    engine = replace(DEPLOYMENT, running=37, waiting=5, kv_use=0.42)
    text = drawn(replace(PROGRESS, deployments=(engine, replace(DEPLOYMENT, deployment_id=2))), width=120)
    row = next(line for line in text.splitlines() if " 37 " in line)
    assert "42 %" in row
    assert "━━━" in row
    assert "runs" in text
    assert "KV blocks" in text
    assert {len(line) for line in text.splitlines()} == {120}
    assert "KV" not in drawn(PROGRESS, width=120)
    assert "###" in drawn(replace(PROGRESS, deployments=(engine,)), width=100, glyphs=ASCII)


def test_requests_share_the_time_of_a_continuous_engine() -> None:
    """Two run from 0 to 4 s and from 2 to 6 s on one GPU: six seconds in all, three each."""
    requests = table(
        [
            [1, 1, 1, 0, 0, 1_000_000, 4_000_000, COMPLETED, 0, 1, 2],
            [2, 1, 1, 0, 2_000_000, 3_000_000, 6_000_000, COMPLETED, 0, 1, 2],
        ]
    )
    exclusive = deployment(1)
    continuous = replace(exclusive, endpoint=replace(exclusive.endpoint, batching=Batching.CONTINUOUS))
    gpus = exclusive.plan.configuration.gpus
    for record, seconds in ((exclusive, 8), (continuous, 6)):
        overall = summarise(run_record(requests, deployments=[record])).overall
        assert overall.operational_cost_gpu_hours == pytest.approx(gpus * seconds / 3600)
        assert overall.gpu_hours.p50 == pytest.approx(gpus * seconds / 7200)
