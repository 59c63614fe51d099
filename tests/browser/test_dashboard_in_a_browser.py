"""The dashboard in a real browser: it follows its server, keeps what the reader has set, and says what is wrong."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from report_fixtures import HOSTILE
from test_report_in_a_browser import Opened, axe, chromium, pytestmark  # noqa: F401  (the fixture and its marks)

sys.path.append(str(Path(__file__).parents[1] / "serve"))
from test_dashboard import SECOND, outcome, progress, state_of, status

from maveriq.report.page.page import Page
from maveriq.report.page.render import live_update, to_live_shell
from maveriq.serve.dashboard_page import dashboard_page
from maveriq.serve.history import ClusterHistory, RecentRequests

URL = "http://dashboard.test/dashboard"


class Server:
    """Answers the browser in place of a server; each answer is newer than the one before."""

    def __init__(self) -> None:
        self.history, self.recent = ClusterHistory(), RecentRequests()
        self.models = [HOSTILE, "tiny"]
        self.asked = 0
        self.is_down = False

    def answer(self, route: Any) -> None:
        path = route.request.url.removeprefix("http://dashboard.test")
        if path == "/dashboard":
            page = Page(title="maveriq serve", subtitle="", kind="live", verdicts=[], cards=[], sections=[])
            shell = to_live_shell(page, data_path="/dashboard/data")
            headers = {"Content-Security-Policy": shell.policy, "Content-Type": "text/html; charset=utf-8"}
            route.fulfill(body=shell.html, headers=headers)
        elif path != "/dashboard/data" or self.is_down:
            route.fulfill(status=503)
        else:
            route.fulfill(body=self._data(), content_type="application/json")

    def _data(self) -> str:
        self.asked += 1
        now = progress(5 * self.asked, running=self.asked)
        for _ in range(3):
            at_s = 5.0 * len(self.history)
            kept = tuple(
                status(number, model=model, gpu_ids=(number,), running=number, kv_use=0.1)
                for number, model in enumerate(self.models, start=1)
            )
            now = progress(at_s, deployments=kept, running=self.asked, gpus=3)
            self.history.add(now, 1_800_000_000 + at_s)
            for number, model in enumerate(self.models, start=1):
                self.recent.add(model, number, outcome(at_s), prompt_tokens=3, slo_us=3 * SECOND)
        page = dashboard_page(state_of(self.history, self.recent, now, in_flight=self.asked))
        return json.dumps(live_update(page) | {"time": f"00:00:{self.asked:02} UTC", "every_s": 0.5})


def until_asked(page: Any, server: Server, more: int) -> None:
    target = server.asked + more
    for _ in range(600):
        page.wait_for_timeout(100)
        if server.asked >= target and page.inner_text("#updated").startswith(f"Updated 00:00:{server.asked:02}"):
            return
    pytest.fail("the page did not ask again")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_it_follows_its_server_and_keeps_what_the_reader_has_set(chromium: Any, width: int, scheme: str) -> None:  # noqa: F811
    server = Server()
    found = Opened(chromium, URL, width=width, scheme=scheme, answer=server.answer)
    page = found.page
    charts = page.locator(".chart").count()
    assert charts == page.locator('.chart[data-state="drawn"]').count() > 8
    page.click('.tools[data-chart="requests"] button >> nth=0')  # zoom in: it stays
    page.click("#figure-requests summary")
    page.uncheck(".models input >> nth=1")
    before = page.inner_text("#cards")
    until_asked(page, server, 2)
    assert page.inner_text("#cards") != before
    assert page.locator("#figure-requests details[open]").count() == 1
    assert page.locator(".bk-Figure").count() == charts, "charts are changed, not drawn again"
    server.models.append("newcomer")  # other charts and models: drawn anew
    until_asked(page, server, 2)
    assert page.locator(".models input").count() == 3
    assert not page.is_checked(".models input >> nth=1")
    assert page.locator("#figure-requests details[open]").count() == 1
    assert page.locator(".bk-Figure").count() == page.locator('.chart[data-state="drawn"]').count()
    assert page.locator("img").count() == 0
    assert HOSTILE in page.inner_text(".models")
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    violations = page.evaluate("axe.run(document).then((found) => found.violations)")
    assert [(each["impact"], each["id"], each["nodes"][0]["html"]) for each in violations] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert found.logged == []
    assert set(found.requested) == {URL, f"{URL}/data"}
    page.focus("#pause")
    page.keyboard.press("Enter")
    asked = server.asked
    page.wait_for_timeout(1500)
    assert server.asked == asked
    assert page.inner_text("#updated") == "Paused"
    server.is_down = True
    page.keyboard.press("Enter")
    page.wait_for_selector("#updated.poor")
    assert page.inner_text("#updated") == "The server answers 503; the next try is in 5 s"
    assert page.inner_text("#status") == page.inner_text("#updated"), "a screen reader hears it"
    found.context.close()
