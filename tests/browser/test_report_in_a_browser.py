"""Reports in a real browser: nothing is loaded, nothing is logged, all charts are drawn, axe finds nothing.

They need Chromium (Debian's package `chromium`, or the path in MAVERIQ_CHROMIUM) and the dependency group `browser`.
Without, they are skipped.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from report_fixtures import HOSTILE, finished_sweep, queue_of_two_models, results, run_of, sizing

from maveriq.report.page.comparison_page import comparison_page
from maveriq.report.page.page import Page
from maveriq.report.page.render import write_page
from maveriq.report.page.run_page import run_page
from maveriq.sizing.page import FoundSizing, sizing_page
from maveriq.sweeps.page import sweep_page

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright; pip install --group browser")
axe = pytest.importorskip("axe_playwright_python", reason="no axe; pip install --group browser")
CHROMIUM = os.environ.get("MAVERIQ_CHROMIUM") or shutil.which("chromium")

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium; apt-get install chromium, or set MAVERIQ_CHROMIUM"),
    pytest.mark.filterwarnings("default"),
]
WIDTHS, SCHEMES = (1280, 390), ("light", "dark")
SECONDS_TO_DRAW = 2.0
LARGE = 100_000


def sweep(folder: Path) -> Page:
    grid = {"policy": ["llf", "packing"], "scale": [0.1, 0.2, 0.4], "seed": [1, 2, 3]}
    return sweep_page(finished_sweep(folder / "sweep", grid=grid), name="sweep")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    run = results(queue_of_two_models((HOSTILE, "big")), name=HOSTILE, slo_ttft_s=1.0)
    pages = {
        "run": run_page(run),
        "comparison": comparison_page([run_of(HOSTILE, 1), run_of("b", 2), run_of("c", 3)]),
        "sweep": sweep(folder),
        "sizing": sizing_page(msgspec.convert(sizing(), FoundSizing), name="sizing"),
    }
    for name, page in pages.items():
        write_page(page, folder / f"{name}.html", overwrite=False)
    return {name: folder / f"{name}.html" for name in pages}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page in a browser, with what it logged and asked for, when all charts are drawn."""

    def __init__(
        self, browser: Any, path: Path | str, *, width: int = 1280, scheme: str = "light", answer: Any = None
    ) -> None:
        """Open a file, or a URL to whose requests `answer` answers."""
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.logged: list[str] = []
        self.requested: list[str] = []
        self.page.on("console", lambda message: self._log(message.type, message.text))
        self.page.on("pageerror", lambda error: self._log("error", str(error)))
        self.page.on("request", lambda request: self.requested.append(request.url))
        if answer is not None:
            self.page.route("**/*", answer)
        self.page.goto(path.as_uri() if isinstance(path, Path) else path)
        self.page.wait_for_selector('html[data-state="drawn"]', timeout=60_000)

    def _log(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.logged.append(text)


@pytest.fixture
def opened(chromium: Any) -> Iterator[Any]:
    kept: list[Opened] = []

    def open_page(path: Path, **how: Any) -> Opened:
        kept.append(Opened(chromium, path, **how))
        return kept[-1]

    yield open_page
    for each in kept:
        each.context.close()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["run", "comparison", "sweep", "sizing"])
def test_a_report_is_drawn_alone_and_accessible(
    reports: dict[str, Path], opened: Any, kind: str, width: int, scheme: str
) -> None:
    found = opened(reports[kind], width=width, scheme=scheme)
    page = found.page
    assert found.logged == []
    assert found.requested == [reports[kind].as_uri()]
    assert page.locator(".chart").count() == page.locator('.chart[data-state="drawn"]').count() > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    violations = page.evaluate("axe.run(document).then((found) => found.violations)")
    assert [(each["impact"], each["id"], each["nodes"][0]["html"]) for each in violations] == []


def test_a_name_runs_nothing(reports: dict[str, Path], opened: Any) -> None:
    page = opened(reports["run"]).page
    assert page.locator("img").count() == 0
    assert HOSTILE in page.inner_text(".models")
    page.hover(".chart >> nth=0", position={"x": 300, "y": 40})
    assert page.locator("img").count() == 0


def test_the_policy_stops_a_script_and_a_connection(reports: dict[str, Path], opened: Any) -> None:
    page = opened(reports["run"]).page
    assert page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.brokenOut = true";
            document.body.append(script);
            return window.brokenOut === undefined;
        }"""
    )
    assert page.evaluate("fetch('data:text/plain,a').then(() => 'fetched', () => 'stopped')") == "stopped"


def test_models_are_hidden_and_colours_change_by_keyboard(reports: dict[str, Path], opened: Any) -> None:
    found = opened(reports["run"])
    page = found.page
    page.focus(".models input >> nth=0")
    page.keyboard.press("Space")
    shown = [item for item in page.locator(".legend li:visible").all_inner_texts() if HOSTILE in item]
    assert shown == []
    assert page.inner_text("#status") == "1 models are shown in the charts"
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.focus("#theme")
    page.keyboard.press("Enter")
    assert page.get_attribute("#theme", "aria-pressed") == "true"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    assert found.logged == []


def test_charts_over_time_zoom_together(reports: dict[str, Path], opened: Any) -> None:
    found = opened(reports["run"])
    charts = {name: found.page.locator(f'.chart[data-chart="{name}"]') for name in ("requests", "gpu-load", "ttft")}
    before = {name: chart.screenshot() for name, chart in charts.items()}
    found.page.focus('.tools[data-chart="requests"] button >> nth=0')
    found.page.keyboard.press("Enter")
    found.page.wait_for_timeout(1000)
    changed = {name: chart.screenshot() != before[name] for name, chart in charts.items()}
    assert changed == {"requests": True, "gpu-load": True, "ttft": False}
    found.page.locator('.tools[data-chart="gpu-load"] button').last.click()
    found.page.mouse.move(0, 0)
    found.page.wait_for_timeout(1000)
    assert {name: chart.screenshot() == before[name] for name, chart in charts.items()} == dict.fromkeys(charts, True)
    assert found.logged == []


def test_it_prints(reports: dict[str, Path], opened: Any, tmp_path: Path) -> None:
    page = opened(reports["run"], scheme="dark").page
    page.emulate_media(media="print")
    assert not page.is_visible("nav")
    assert not page.is_visible(".tools >> nth=0")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.emulate_media(media="screen")
    path = tmp_path / "report.pdf"
    page.pdf(path=str(path), prefer_css_page_size=True)
    assert path.read_bytes().startswith(b"%PDF")


def test_a_large_run_is_small_and_drawn_in_time(tmp_path: Path, opened: Any) -> None:
    """The time is the processor's that the main thread of the page takes, at best: the machine may have other work."""
    path = tmp_path / "large.html"
    write_page(run_page(results(queue_of_two_models(requests=LARGE))), path, overwrite=False)
    assert path.stat().st_size < 5_000_000
    assert min(_main_thread_s(opened(path)) for _ in range(3)) < SECONDS_TO_DRAW


def _main_thread_s(found: Opened) -> float:
    """Return the processor's time that the main thread of a page has taken."""
    assert found.logged == []
    session = found.context.new_cdp_session(found.page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    values = {each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]}
    return float(values["ThreadTime"])


def test_the_command_writes_a_file_that_opens(tmp_path: Path, opened: Any) -> None:
    command = [sys.executable, "-m", "maveriq"]
    run = [*command, "sim", "--limit", "100", "--quiet", "--out", str(tmp_path / "run")]
    subprocess.run(run, check=True, capture_output=True)
    out = tmp_path / "run.html"
    subprocess.run([*command, "report", str(tmp_path / "run"), "--out", str(out)], check=True, capture_output=True)
    assert opened(out).logged == []
