"""Live views: update rate, layout, and output without a terminal."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from maveriq.domain.progress import DeploymentStatus, GpuStatus, Progress
from maveriq.report.formatting import ASCII, UNICODE, bar, sparkline
from maveriq.report.live import Canvas, History, LiveView, PlainView, QuietView, Series, frame, make_view

DEPLOYMENT = DeploymentStatus(
    deployment_id=1,
    endpoint_id=1,
    model="a-70b",
    configuration="TP 2 x PP 4 int4_gptq+kv8",
    layer_split=(20, 20, 21, 19),
    gpu_ids=tuple(range(8)),
    status="up",
    waiting=11,
    completed=1203,
)


def gpu(gpu_id: int, *, down: bool = False) -> GpuStatus:
    return GpuStatus(gpu_id=gpu_id, used_bytes=12 << 30, capacity_bytes=48 << 30, load=0.83, down=down)


PROGRESS = Progress(
    now_us=1_200_000_000,
    last_arrival_us=2_100_000_000,
    total=5000,
    arrived=2600,
    waiting=57,
    running=3,
    completed=2488,
    refused=12,
    failed=0,
    recent_p50_s=1.234,
    recent_p95_s=7.5,
    recent_slo_attainment=0.931,
    deployments=(DEPLOYMENT,),
    gpus=tuple(gpu(i, down=i == 5) for i in range(8)),
)


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def drawn(progress: Progress, *, width: int = 80, height: int = 30, glyphs=UNICODE) -> str:
    history = History()
    for k in range(40):
        history.add(replace(progress, now_us=30_000_000 * k, completed=60 * k, waiting=k))
    console = Console(width=width, file=io.StringIO())
    console.print(frame(progress, history, left_s=125.0, canvas=Canvas(width=width, height=height, glyphs=glyphs)))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_frame_shows_the_run_within_its_width(width):
    text = drawn(PROGRESS, width=width)
    assert {len(line) for line in text.splitlines()} == {width}
    for part in (
        "20:00 of 35:00", "50 %", "2:05 left", "2,488 of 5,000 completed", "57 waiting", "12 refused",
        "2.00 requests/s", "1.23 s p50", "7.50 s p95", "93.1 % met the SLO", "a-70b", "TP 2 x PP 4 int4_gptq+kv8",
        "0-7", "1,203", "12.0/48 GiB", "83 %", "down", "█",
    ):  # fmt: skip
        assert part in text, part


def test_a_frame_before_anything_happened():
    blank = replace(
        PROGRESS, now_us=0, total=0, completed=0, recent_p50_s=None, recent_p95_s=None, recent_slo_attainment=None,
        deployments=(), gpus=(),
    )  # fmt: skip
    assert "–" in drawn(blank)


def test_many_gpus_and_deployments_fit_the_height():
    many = tuple(replace(DEPLOYMENT, deployment_id=i, waiting=i) for i in range(40))
    text = drawn(replace(PROGRESS, deployments=many, gpus=tuple(gpu(i) for i in range(64))), height=24)
    assert len(text.splitlines()) <= 24
    assert "and 32 more" in text
    assert "GPUs 0-55" in text


def test_plain_terminals_get_plain_characters():
    assert bar(0.5, width=4, style="", glyphs=ASCII).plain == "##--"
    assert bar(0.001, width=4, style="", glyphs=ASCII).plain == "#---"
    assert bar(0.0, width=4, style="", glyphs=ASCII).plain == "----"
    assert sparkline([0, 1, 8], glyphs=ASCII) == " .@"
    assert sparkline([0, 0], glyphs=UNICODE) == "  "


def test_a_series_keeps_its_history_and_peaks():
    series = Series()
    for k in range(10_000):
        series.add(999 if k == 5000 else k % 7)
    values = series.resampled(40)
    assert len(values) == 40
    assert max(values) == 999
    assert abs(values.index(999) - 20) <= 1


def test_a_live_view_updates_at_most_ten_times_a_second():
    now = FakeClock()
    console = Console(width=80, force_terminal=True, file=io.StringIO())
    frames = 0
    with LiveView(console, now=now) as view:
        for _ in range(1000):  # one second in steps of a millisecond
            if view.wants_update():
                view.update(PROGRESS)
                frames += 1
            now.now_s += 0.001
    assert 4 <= frames <= 10
    assert "a-70b" in console.file.getvalue()


def test_a_plain_view_prints_lines_at_intervals():
    now = FakeClock()
    console = Console(width=40, file=io.StringIO())
    with PlainView(console, now=now) as view:
        assert not view.wants_update()
        now.now_s = 10.0
        assert view.wants_update()
        view.update(PROGRESS)
        assert not view.wants_update()
    assert console.file.getvalue() == (
        "clock 20:00 of 35:00, 2,488 of 5,000 completed, 3 running, 57 waiting, 12 refused, "
        "recent p50 1.23 s, p95 7.50 s, recent SLO 93.1 %, 0:07 left\n"
    )


def test_the_time_left_is_that_of_the_clock_from_the_first_second():
    now = FakeClock()
    console = Console(width=200, file=io.StringIO())
    with PlainView(console, now=now) as view:
        now.now_s = 1.0  # 10 s of 2,100 s are over, and nothing has completed
        view.update(replace(PROGRESS, now_us=10_000_000, completed=0, refused=0))
        now.now_s = 220.0  # all have arrived, and half have ended
        view.update(replace(PROGRESS, now_us=2_200_000_000, completed=2_500, refused=0))
    first, second = console.file.getvalue().splitlines()
    assert first.endswith("3:29 left")
    assert second.endswith("3:40 left")


def test_the_view_suits_the_console():
    console = Console(file=io.StringIO())
    assert isinstance(make_view(console, quiet=False, interactive=True), LiveView)
    assert isinstance(make_view(console, quiet=False, interactive=False), PlainView)
    with make_view(console, quiet=True, interactive=True) as view:
        assert isinstance(view, QuietView)
        assert not view.wants_update()
        view.update(PROGRESS)
    assert console.file.getvalue() == ""
