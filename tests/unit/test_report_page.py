"""The HTML report: it loads nothing, no name can break out of it, and its figures are those of the summary."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_fixtures import run_record, runs, table
from report_fixtures import HOSTILE, Parsed, queue_of_two_models, results

import maveriq
from maveriq.domain.records import NOT_YET, GpuSample, RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.errors import InputError, MaveriqError
from maveriq.report.formatting import figure, share
from maveriq.report.page import render
from maveriq.report.page.page import Page
from maveriq.report.page.render import as_script_data, to_html, write_page
from maveriq.report.page.run_page import run_page
from maveriq.report.page.sampling import distribution, level_over_time, percentiles_over_time
from maveriq.units import bytes_from_gib, micros

pytest.importorskip("bokeh")
LOADING = {"img", "link", "iframe", "object", "embed", "audio", "video", "source", "base", "frame"}
MIB = 1 << 20


@pytest.fixture(scope="module")
def hostile_html() -> str:
    record = queue_of_two_models((HOSTILE, "big"))
    return to_html(run_page(results(record, name=HOSTILE, slo_ttft_s=1.0)))


def test_a_report_names_nothing_outside_itself(hostile_html: str) -> None:
    parsed = Parsed(hostile_html)
    assert not LOADING & {tag for tag, _ in parsed.elements}
    for tag, attributes in parsed.elements:
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith("#"), tag
        assert not any(name.startswith("on") for name in attributes), tag
    assert "@import" not in hostile_html
    assert "url(" not in hostile_html.split("<style>")[1].split("</style>", maxsplit=1)[0]


def test_the_policy_allows_the_scripts_of_the_page_and_nothing_else(hostile_html: str) -> None:
    parsed = Parsed(hostile_html)
    policy = next(a["content"] for tag, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "unsafe-eval" not in policy
    assert "http" not in policy
    code = [
        text
        for text, (_, attributes) in zip(
            parsed.scripts, [element for element in parsed.elements if element[0] == "script"], strict=True
        )
        if attributes.get("type") != "application/json"
    ]
    hashes = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code}
    assert hashes == set(re.findall(r"'sha256-([^']+)'", policy))


def test_no_name_breaks_out_of_the_page(hostile_html: str) -> None:
    parsed = Parsed(hostile_html)
    assert len(parsed.scripts) == 4
    data = json.loads(parsed.scripts[0])
    assert HOSTILE in [series["name"] for series in data["latency-all"]["series"]]
    assert HOSTILE in parsed.text


@given(st.dictionaries(st.text(), st.text() | st.lists(st.text(alphabet="<>&/script!-\u2028\u2029'\"")), max_size=3))
def test_data_cannot_end_their_element(value: object) -> None:
    text = as_script_data({"value": value})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"value": value}


def test_the_cards_are_the_figures_of_the_summary() -> None:
    found = results(queue_of_two_models(), slo_ttft_s=1.0)
    cards = {card.label: card for card in run_page(found).cards}
    overall = found.summary.overall
    assert overall.slo
    assert overall.goodput
    assert overall.latency_s
    assert overall.tpot_s
    assert cards["SLO attainment"].value == share(overall.slo.over_scheduled)
    assert cards["Goodput"].value == share(overall.goodput.share)
    assert cards["Latency, p95"].value == f"{figure(overall.latency_s.p95)} s"
    assert cards["TPOT, p95"].value == f"{figure(1e3 * overall.tpot_s.p95)} ms"
    assert cards["Throughput"].value == f"{figure(overall.throughput_per_s)} /s"
    text = Parsed(to_html(run_page(found))).text
    for card in cards.values():
        assert card.value in text


@settings(max_examples=25)
@given(runs())
def test_the_counts_of_the_requests_add_up(record: RunRecord) -> None:
    card = next(card for card in run_page(results(record)).cards if card.label == "Requests")
    parts = [int(count.replace(",", "")) for count in re.findall(r"[\d,]+", card.detail)]
    assert sum(parts) == int(card.value.replace(",", "")) == len(record.requests)


@settings(max_examples=25)
@given(runs())
def test_any_run_has_a_page_of_charts_with_their_own_names_and_finite_data(record: RunRecord) -> None:
    page = run_page(results(record, slo_ttft_s=1.0, slo_tpot_s=0.1))
    names = [chart.chart_id for chart in page.charts] + [section.section_id for section in page.sections]
    assert len(set(names)) == len(names)
    as_script_data({chart.chart_id: chart.to_json() for chart in page.charts})
    for chart in page.charts:
        assert chart.summary
        assert chart.table.rows
        assert all(len(row.cells) == len(chart.table.columns) for row in chart.table.rows)


def test_a_run_that_refused_all_says_so() -> None:
    rows = [[k, 1, 0, k, NOT_YET, NOT_YET, NOT_YET, RequestStatus.REFUSED.value, 1, 1, 1, 0] for k in range(1, 4)]
    html = to_html(run_page(results(run_record(table(rows)))))
    text = Parsed(html).text
    assert "0 completed + 3 refused + 0 failed + 0 unfinished" in text
    assert "not deployed" in text


def test_many_gpus_are_shown_in_groups() -> None:
    samples = [
        GpuSample(time_us=micros(float(k)), gpu_id=gpu, memory_bytes=bytes_from_gib(1.0), busy_share=0.5)
        for k in range(1, 4)
        for gpu in range(1000)
    ]
    record = replace(queue_of_two_models(requests=20), gpu_samples=tuple(samples))
    (load,) = (chart for chart in run_page(results(record)).charts if chart.chart_id == "gpu-load")
    shown = load.to_json()
    assert len(shown["rows"]) == len(load.table.rows) == 63
    assert shown["rows"][0] == "GPUs 0-15"
    assert {value for row in shown["values"] for value in row} == {50}


def test_the_options_on_a_page_simulate_the_same_run(tmp_path: Path) -> None:
    run = maveriq.simulate(limit=10, slo_scale=5)
    path = run.to_html(tmp_path / "run.html")
    assert str(run.meta["workload"]) in path.read_text(encoding="utf-8")
    (snippet,) = run_page(run.results("run")).snippets
    again = maveriq.simulate(**json.loads(snippet.text))
    assert again.requests.equals(run.requests)


def test_size_is_bounded_whatever_the_number_of_requests() -> None:
    few, many = (_data_size(queue_of_two_models(requests=count)) for count in (3_000, 30_000))
    assert many < 1.2 * few
    assert many < 0.5 * MIB


def _data_size(record: RunRecord) -> int:
    page = run_page(results(record))
    return len(as_script_data({chart.chart_id: chart.to_json() for chart in page.charts}))


def test_every_deployment_has_a_reason() -> None:
    page = run_page(results(queue_of_two_models()))
    (section,) = (section for section in page.sections if section.section_id == "deployments")
    reasons = [row.cells[-1] for row in section.tables[0].rows]
    assert reasons == [
        "best for min-cost; GPUs by the policy llf",
        "big; best for min-cost; GPUs by the policy llf",
    ]


def test_a_file_is_replaced_only_if_asked_for(tmp_path: Path) -> None:
    page = run_page(results(queue_of_two_models(requests=20)))
    path = tmp_path / "report.html"
    write_page(page, path, overwrite=False)
    with pytest.raises(InputError, match="--overwrite"):
        write_page(page, path, overwrite=False)
    write_page(page, path, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_without_bokeh_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render.importlib.util, "find_spec", lambda name: None)
    page = Page(title="a", subtitle="", kind="run", verdicts=[], cards=[], sections=[])
    with pytest.raises(MaveriqError, match=re.escape("pip install 'maveriq[report]'")):
        to_html(page)


# ---- fewer points that show the same ---------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 400), min_size=1, max_size=2000))
def test_a_distribution_is_exact_at_each_of_its_points(values: list[int]) -> None:
    x, shares = distribution(np.array(values))
    assert len(x) <= 251
    assert shares[-1] == 1
    assert x[-1] == max(values)
    for value, part in zip(x.tolist(), shares.tolist(), strict=True):
        assert part == pytest.approx(sum(each <= value for each in values) / len(values))


def test_a_distribution_of_many_values_leaves_no_gap_above_half_a_percent() -> None:
    x, shares = distribution(np.random.default_rng(2).exponential(size=50_000))
    assert len(x) < 300
    assert np.diff(shares, prepend=0).max() <= 0.0051


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 60)), max_size=40), st.integers(1, 30))
def test_levels_over_time_show_each_peak_and_each_trough(spans: list[tuple[int, int]], parts: int) -> None:
    starts, ends = np.array([a for a, _ in spans], float), np.array([a + b for a, b in spans], float)
    edges, low, high = level_over_time(starts, ends, 120.0, parts=parts)

    def level(time: float) -> int:
        return int((starts <= time).sum() - (ends <= time).sum())

    instants = np.unique(np.concatenate([np.arange(0, 120, 0.5), edges[:-1]]))
    for part in range(parts):
        within = instants[(instants >= edges[part]) & (instants < edges[part + 1])]
        levels = [level(time) for time in within.tolist()]
        assert (low[part], high[part]) == (min(levels), max(levels))


def numbers() -> Iterator[tuple[float, float]]:
    random = np.random.default_rng(3)
    yield from zip(random.uniform(0, 100, 500).tolist(), random.exponential(size=500).tolist(), strict=True)


def test_percentiles_over_time_are_those_of_numpy() -> None:
    times, values = map(np.array, zip(*numbers(), strict=True))
    middles, (p50, p95) = percentiles_over_time(times, values, 100.0, (50.0, 95.0), parts=10)
    for part, middle in enumerate(middles.tolist()):
        within = values[np.abs(times - middle) <= 5]
        assert [p50[part], p95[part]] == pytest.approx(np.percentile(within, [50, 95]).tolist())
