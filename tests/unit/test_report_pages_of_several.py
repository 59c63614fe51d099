"""Reports of several runs, sweeps and sizings: their figures are those of the comparison, the tables, the JSON."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from report_fixtures import HOSTILE, Parsed, finished_sweep, run_of, sizing

from maveriq.errors import InputError
from maveriq.report.compare import compare
from maveriq.report.page.charts import LineChart
from maveriq.report.page.comparison_page import comparison_page
from maveriq.report.page.page import Page
from maveriq.report.page.render import to_html
from maveriq.report.run_labels import RunLabel
from maveriq.sizing.page import FoundSizing, read_sizing, sizing_page
from maveriq.sweeps.folder import CELLS_FILE, open_folder
from maveriq.sweeps.page import sweep_page
from maveriq.sweeps.run import load_sweep
from maveriq.sweeps.spec import read_sweep


def charts_of(page: Page) -> dict[str, Any]:
    return {chart.chart_id: chart.to_json() for chart in page.charts}


# ---- comparisons -----------------------------------------------------------------------------------------------------


def test_a_comparison_leads_with_its_differences() -> None:
    runs = [run_of("slow", 1, load=0.9), run_of("fast", 2)]
    compared = compare(
        runs[0].record,
        runs[1].record,
        labels=(RunLabel(name="slow", kind="simulated"), RunLabel(name="fast", kind="simulated")),
    )
    error = compared.overall.differences["mean"].error
    assert error is not None
    page = comparison_page(runs)
    found = re.search(r"mean latency \+([\d.,]+) %", page.verdicts[0].headline)
    assert found is not None
    assert float(found[1].replace(",", "")) == pytest.approx(error, rel=0.01)
    assert [verdict.headline.split(":")[0] for verdict in page.verdicts[1:]] == ["slow", "fast"]
    assert [series["name"] for series in charts_of(page)["latency-all"]["series"]] == ["slow", "fast"]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_any_number_of_runs_is_compared_with_the_last(count: int) -> None:
    page = comparison_page([run_of(f"run {number}{HOSTILE}", number) for number in range(count)])
    html = Parsed(to_html(page))
    assert len(html.scripts) == 4
    assert not any(tag == "img" for tag, _ in html.elements)
    assert len(page.verdicts) == 2 * count - 1
    assert len({series["style"] for series in charts_of(page)["requests"]["series"]}) == count


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def test_a_sweep_shows_means_over_seeds_with_intervals(tmp_path: Path) -> None:
    grid = {"policy": ["llf", "packing"], "scale": [0.1, 0.2, 0.4], "seed": [1, 2, 3]}
    result = finished_sweep(tmp_path / "sweep", grid=grid)
    page = sweep_page(result, name="sweep")
    (chart,) = (chart for chart in page.charts if chart.chart_id == "latency-mean-s")
    assert isinstance(chart, LineChart)
    assert [line.name for line in chart.lines] == ["llf", "packing"]
    line = chart.lines[0]
    assert line.x.tolist() == [0.1, 0.2, 0.4]
    assert line.y == pytest.approx([1.02, 2.02, 4.02])
    assert line.low is not None
    half = result.seeds[result.seeds["model"] == "all"]["latency_mean_s_ci95"].to_numpy()[:3]
    assert line.y - line.low == pytest.approx(half)
    assert "policy llf, scale 0.1 with 1.02 s" in page.verdicts[0].headline
    assert page.verdicts[0].sentences[1] == "1 other combination equals it."


def test_a_sweep_without_numbers_has_bars_and_failed_runs_are_named(tmp_path: Path) -> None:
    result = finished_sweep(tmp_path / "sweep", grid={"policy": ["llf", "packing", "hybrid"]}, fail=2)
    page = sweep_page(result, name="sweep")
    assert [bar["name"] for bar in charts_of(page)["latency-mean-s"]["bars"]] == ["llf", "hybrid"]
    html = Parsed(to_html(page))
    assert HOSTILE in html.text
    assert not any(tag == "img" for tag, _ in html.elements)
    cards = {card.label: card for card in page.cards}
    assert (cards["Runs"].value, cards["Runs"].detail) == ("2", "simulated of 3; 1 failed")


def test_reading_a_sweep_leaves_its_folder_as_it_is(tmp_path: Path) -> None:
    finished_sweep(tmp_path, grid={"policy": ["llf"]})
    log = tmp_path / CELLS_FILE
    log.write_bytes(log.read_bytes() + b'{"number": 2, "err')  # a sweep is writing this line
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(load_sweep(tmp_path).cells) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_sweep_that_has_no_run_yet_says_so(tmp_path: Path) -> None:
    spec = read_sweep({"name": "none", "grid": {"policy": ["llf"]}})
    with open_folder(tmp_path / "sweep", spec, overwrite=False):
        page = sweep_page(load_sweep(tmp_path / "sweep"), name="none")
    assert page.verdicts[0].headline == "No run was simulated"
    to_html(page)


# ---- sizings ---------------------------------------------------------------------------------------------------------


def test_a_sizing_leads_with_its_answer(tmp_path: Path) -> None:
    path = tmp_path / "size.json"
    path.write_text(json.dumps(sizing()))
    page = sizing_page(read_sizing(path), name="size")
    verdict = page.verdicts[0]
    assert verdict.headline == "5 x H100-SXM, $14.95 an hour"
    assert verdict.sentences == [
        "They meet the SLOs for 98.3 % of the requests; 98.0 % are asked for.",
        "Chance leaves 4 to 6 possible (95 %).",
        "4 meet them for 92.6 %. The run is stable.",
        "One more GPU changes the attainment by +0.85 points.",
        "If all steps take 10 % longer than estimated, 7 GPUs are needed.",
    ]
    chart = charts_of(page)["attainment"]
    assert chart["target"] == 98
    assert chart["series"][0]["y"] == [92.6, 98.3, 99.15]
    assert HOSTILE in Parsed(to_html(page)).text


def test_a_sizing_without_an_answer_says_so() -> None:
    found = msgspec.convert(sizing(gpus=None, usd_per_hour=None, gpus_high=None), FoundSizing)
    page = sizing_page(found, name="size")
    assert page.verdicts[0].tone == "poor"
    assert page.verdicts[0].headline == "No cluster of up to 6 x H100-SXM meets the SLOs"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"attainment_target": 0.9, "cheapest": null, "kinds": []}'])
def test_another_file_is_no_sizing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "size.json"
    path.write_text(text)
    with pytest.raises(InputError, match="maveriq size --json"):
        read_sizing(path)
