"""The dashboard: who may see it, how often it is made, what it shows, and that it stays small."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from report_fixtures import HOSTILE, Parsed
from running import MODEL, Running, running, until

from maveriq.domain.progress import DeploymentStatus, GpuStatus, Progress
from maveriq.domain.requests import RequestStatus
from maveriq.exec.live_cluster import Outcome
from maveriq.report.page.charts import Axis, GanttChart, HeatMap, Line, LineChart, Span, on_clock
from maveriq.report.page.render import live_update
from maveriq.report.view import Column, Table
from maveriq.serve import dashboard
from maveriq.serve.dashboard_page import ServiceState, dashboard_page
from maveriq.serve.history import MAX_DEPLOYMENTS, MAX_SAMPLES, SAMPLE_EVERY_S, ClusterHistory, RecentRequests
from maveriq.serve.settings import ServeSettings

pytest.importorskip("bokeh")
TOKEN = "s3cret-of-the-dashboard"  # noqa: S105
PATHS = ("/dashboard", "/dashboard/data")
GIB, SECOND = 1 << 30, 1_000_000


# ---- the routes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("dashboard") / "s.db", ServeSettings(token=TOKEN)) as server:
        yield server


def basic(password: str, user: str = "anybody") -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}


@pytest.mark.parametrize("path", PATHS)
def test_the_token_opens_it_as_a_header_or_as_a_password(guarded: Running, path: str) -> None:
    with guarded.client() as http:
        asked = http.get(path)
        assert asked.status_code == 401
        assert asked.headers["www-authenticate"].startswith("Basic realm=")
        assert len(asked.content) < 300, "a stranger gets nothing of the page"
        for headers in ({"Authorization": f"Bearer {TOKEN}"}, basic(TOKEN), basic(TOKEN, user="")):
            assert http.get(path, headers=headers).status_code == 200
        for headers in (basic("wrong"), basic(""), {"Authorization": "Basic %%%"}, {"Authorization": f"Basic {TOKEN}"}):
            assert http.get(path, headers=headers).status_code == 401
        assert TOKEN not in http.get(path, headers=basic(TOKEN)).text


@pytest.mark.parametrize("path", ["/health", "/metrics", "/endpoints", "/v1/models", "/dashboard/", "/openapi.json"])
def test_a_password_opens_nothing_else(guarded: Running, path: str) -> None:
    with guarded.client(headers=basic(TOKEN)) as http:
        answer = http.get(path)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert http.post("/dashboard", json={}).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}],
)
def test_another_page_does_not_use_the_password_that_a_browser_knows(guarded: Running, headers: dict[str, str]) -> None:
    with guarded.client(headers=basic(TOKEN)) as http:
        for path in PATHS:
            assert http.get(path, headers=headers).json()["error"]["code"] == "wrong_origin"
        link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        assert http.get("/dashboard", headers=link).status_code == 200


def test_the_page_may_load_nothing_but_its_data(server: Running) -> None:
    with server.client() as http:
        answer = http.get("/dashboard")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src 'self'; frame-ancestors 'none'" in policy
    assert "unsafe-eval" not in policy
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-content-type-options"] == "nosniff"
    parsed = Parsed(answer.text)
    code = parsed.scripts[1:]
    hashes = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code}
    assert hashes == set(re.findall(r"'sha256-([^']+)'", policy))
    assert not any("src" in attributes for _, attributes in parsed.elements)
    assert MODEL not in answer.text, "the page is the same for everybody, and has no data"


def test_a_browser_that_has_the_page_does_not_get_it_again(server: Running) -> None:
    with server.client() as http:
        first = http.get("/dashboard")
        again = http.get("/dashboard", headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        plain = http.get("/dashboard", headers={"Accept-Encoding": "identity"})
        assert plain.text == first.text
        assert int(plain.headers["content-length"]) > 2 * int(first.headers["content-length"])
        assert http.head("/dashboard").headers["etag"] == first.headers["etag"]
        assert http.get("/openapi.json").json()["paths"].keys().isdisjoint(PATHS)


def test_data_show_the_service_and_are_made_once_for_all_who_ask(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[ServiceState] = []
    make = dashboard._make_data
    monkeypatch.setattr(dashboard, "_make_data", lambda state: (made.append(state), make(state))[1])
    with server.client() as http, ThreadPoolExecutor(4) as pool:
        assert http.post("/v1/completions", json={"model": MODEL, "prompt": "a", "slo_ms": 60_000}).status_code == 200
        until(lambda: len(http.get("/dashboard/data").json()["charts"]) > 2)  # data are some seconds old at first
        made.clear()
        texts = [answer.text for answer in pool.map(lambda _: http.get("/dashboard/data"), range(20))]
        assert len(made) <= 1
        assert len(set(texts)) <= 2
        answer = http.get("/dashboard/data")
    assert answer.headers["cache-control"] == "no-store"
    data = answer.json()
    assert data["every_s"] == dashboard.EVERY_S
    assert "Ready: 1 of 1 endpoints are up" in data["main"]
    assert data["charts"]["slo"]["bars"][0]["value"] == 100


def test_only_some_are_sent_at_a_time(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "MAX_SENDING", 0)
    with server.client() as http:
        answer = http.get("/dashboard")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "dashboard_busy")
        assert answer.headers["retry-after"] == "2"
        assert http.get("/health").status_code == 200


# ---- what it shows ---------------------------------------------------------------------------------------------------


def status(number: int, **more: Any) -> DeploymentStatus:
    values = {
        "deployment_id": number, "endpoint_id": number, "model": MODEL, "configuration": "TP 1", "layer_split": (32,),
        "gpu_ids": (0,), "status": "up", "waiting": 0, "completed": 0,
    }  # fmt: skip
    return DeploymentStatus(**(values | more))


def progress(at_s: float, *, deployments: tuple[DeploymentStatus, ...] = (), gpus: int = 2, **more: int) -> Progress:
    counts = {"waiting": 0, "running": 0, "completed": 0, "refused": 0, "failed": 0} | more
    return Progress(
        now_us=int(at_s * SECOND), last_arrival_us=0, total=0, arrived=0, recent_p50_s=None, recent_p95_s=None,
        recent_slo_attainment=None, deployments=deployments, **counts,
        gpus=tuple(
            GpuStatus(gpu_id=k, used_bytes=(1 + k % 3) * GIB, capacity_bytes=8 * GIB, load=0.25, down=False)
            for k in range(gpus)
        ),
    )  # fmt: skip


def outcome(arrival_s: float, *, took_s: float = 2.0, end: RequestStatus = RequestStatus.COMPLETED) -> Outcome:
    arrival_us = int(arrival_s * SECOND)
    has_run = end is RequestStatus.COMPLETED
    return Outcome(
        request_id=1, status=end, reason="", tokens=(1,) * 11, arrival_us=arrival_us,
        start_us=arrival_us if has_run else -1, first_token_us=arrival_us + SECOND if has_run else -1,
        finish_us=arrival_us + int(took_s * SECOND),
    )  # fmt: skip


def state_of(history: ClusterHistory, recent: RecentRequests, now: Progress, **more: Any) -> ServiceState:
    samples = history.samples()
    values = {"status": "ready", "problems": [], "endpoints": ["up"], "in_flight": 0}
    return ServiceState(
        **(values | more), progress=now, samples=samples, requests=recent.table(samples.since_us), models=recent.models
    )


def test_figures_are_those_of_the_requests_and_times_those_of_the_day() -> None:
    history, recent = ClusterHistory(), RecentRequests()
    for k in range(21):
        history.add(progress(100 + 10 * k, waiting=k, completed=4 * k, deployments=(status(1),)), 1_000_000 + 5 * k)
    for k in range(40):
        recent.add(MODEL, 1, outcome(100 + 5 * k, took_s=1 + k / 10), prompt_tokens=3, slo_us=3 * SECOND)
    recent.add("other", 2, outcome(100, end=RequestStatus.REFUSED), prompt_tokens=3, slo_us=0)
    recent.add(MODEL, 1, outcome(99), prompt_tokens=3, slo_us=0)  # before the first sample
    page = dashboard_page(state_of(history, recent, progress(300, running=1, waiting=20), in_flight=21))
    cards = {card.label: card for card in page.cards}
    assert cards["Requests in flight"].value == "21"
    assert cards["Requests ended"].value == "41"
    assert cards["SLO attainment"].value == "52.5 %"  # 21 of 40 took 3 s or less
    assert cards["Throughput"].value == "0.80 /s"  # 4 in 5 s of wall time, 10 s of the cluster's clock
    assert cards["Latency, p95"].value == f"{np.percentile(1 + np.arange(40) / 10, 95):.2f} s"
    assert cards["GPU load"].value == "25.0 %"
    charts = {chart.chart_id: chart.to_json() for chart in page.charts}
    waiting = charts["requests"]["series"][0]
    assert charts["requests"]["x"]["epoch"] == 1_000_000
    assert (waiting["x"][-1], waiting["y"][-1]) == (100, 20)
    assert charts["deployments-over-time"]["spans"][0]["to"] == 100
    assert charts["throughput"]["series"][0]["y"] == [0.8] * 21
    assert charts["gpu-load"]["edges"][-1] == 100
    assert {value for cells in charts["gpu-load"]["values"] for value in cells} - {None} == {25}


def test_a_service_that_has_done_nothing_has_a_page() -> None:
    history, recent = ClusterHistory(), RecentRequests()
    history.add(progress(0), 1_000_000)
    page = dashboard_page(state_of(history, recent, progress(0), endpoints=[]))
    assert page.verdicts[0].headline == "Ready: there is no endpoint yet"
    json.dumps(live_update(page), allow_nan=False)


def test_problems_come_first_and_are_bounded() -> None:
    history = ClusterHistory()
    history.add(progress(0), 1_000_000)
    problems = [f"GPU {k} is down" for k in range(100)]
    page = dashboard_page(
        state_of(history, RecentRequests(), progress(0), status="degraded", problems=problems, endpoints=["up", "down"])
    )
    verdict = page.verdicts[0]
    assert (verdict.headline, verdict.tone) == ("Degraded: 1 of 2 endpoints are up", "poor")
    assert verdict.sentences[0] == "GPU 0 is down"
    assert "88 more problems are in GET /health." in verdict.sentences


def test_no_name_breaks_out_of_the_data() -> None:
    history, recent = ClusterHistory(), RecentRequests()
    hostile = status(1, model=HOSTILE, reason=HOSTILE, configuration=HOSTILE, running=1, kv_use=0.5)
    for k in range(3):
        history.add(progress(k, deployments=(hostile,)), 1_000_000 + k)
    recent.add(HOSTILE, 1, outcome(0), prompt_tokens=3, slo_us=SECOND)
    recent.add("other", 2, outcome(0), prompt_tokens=3, slo_us=SECOND)
    now = progress(3, deployments=(hostile,))
    update = live_update(dashboard_page(state_of(history, recent, now, problems=[HOSTILE])))
    parsed = Parsed(update["main"])
    assert HOSTILE in parsed.text
    assert not {"img", "script"} & {tag for tag, _ in parsed.elements}
    marked = [attributes["id"] for _, attributes in parsed.elements if "data-live" in attributes]
    assert len(set(marked)) == len(marked) > 5
    assert None not in marked
    assert update["charts"]["kv-use"]["series"][0]["y"][-1] == 50


def test_the_history_is_bounded_and_a_large_cluster_stays_small() -> None:
    history, recent = ClusterHistory(), RecentRequests(capacity=100)
    gone = tuple(status(k, status="removed") for k in range(1, 200))
    current = tuple(status(k, gpu_ids=(k,)) for k in range(200, 800))
    for k in range(MAX_SAMPLES + 10):
        history.add(progress(5 * k, deployments=gone + current if k % 300 == 0 else (), gpus=4096), SAMPLE_EVERY_S * k)
    for k in range(250):
        recent.add(MODEL, 1, outcome(4000 + k), prompt_tokens=3, slo_us=0)
    samples = history.samples()
    assert len(samples.times_us) == MAX_SAMPLES
    assert samples.gpus.load.shape == (64, MAX_SAMPLES)
    assert len(samples.deployments) <= MAX_DEPLOYMENTS
    assert len(recent.table(0)) == 100
    now = progress(5 * MAX_SAMPLES, deployments=gone + current, gpus=4096)
    update = live_update(dashboard_page(state_of(history, recent, now)))
    assert update["charts"]["gpu-memory"]["rows"][:2] == ["GPUs 0-63", "GPUs 64-127"]
    assert "first 256 of 600" in update["main"]
    assert len(json.dumps(update)) < 600_000


def test_a_deployment_that_comes_and_goes_is_a_bar_for_each_time() -> None:
    history = ClusterHistory()
    for k, word in enumerate(["loading", "up", "up", "down", "loading", "up", "removed", "removed"]):
        history.add(progress(10 * k, deployments=(status(1, status=word),)), 1_000_000 + 10 * k)
    page = dashboard_page(state_of(history, RecentRequests(), progress(70)))
    spans = next(chart.to_json() for chart in page.charts if chart.chart_id == "deployments-over-time")["spans"]
    assert [(span["from"], span["to"], span["pale"]) for span in spans] == [
        (0, 10, True), (10, 30, False), (40, 50, True), (50, 60, False),
    ]  # fmt: skip


def test_only_axes_of_time_show_the_time_of_day() -> None:
    table = Table("", [Column("")], [])
    named = {"chart_id": "a", "title": "", "summary": "", "table": table}
    line = Line(name="", x=np.array([0.0, 4.0]), y=np.array([1.0, 2.0]), style=1)
    lines = LineChart(**named, x=Axis(label="s"), y=Axis(label="n"), lines=[line], is_over_time=True)
    heat = HeatMap(**named, edges=np.array([0.0, 4.0]), rows=["a"], values=np.zeros((1, 1)), top=1.0, unit="%")
    span = Span(row=0, start_s=1.0, end_s=4.0, text="", style=0, model="")
    gantt = GanttChart(**named, rows=["a"], spans=[span])
    shown = [on_clock(chart, 100.0, scale=0.5).to_json() for chart in (lines, heat, gantt)]
    assert [chart["x"]["epoch"] for chart in shown] == [100] * 3
    assert shown[0]["series"][0]["x"] == shown[1]["edges"] == [0, 2]
    assert (shown[2]["spans"][0]["from"], shown[2]["spans"][0]["to"]) == (0.5, 2)
    distribution = replace(lines, is_over_time=False)
    assert on_clock(distribution, 100.0) is distribution
