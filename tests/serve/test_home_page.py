"""The page at / says what the service offers."""

from running import MODEL, Running

from maveriq.serve.home_page import Route, as_html, as_text


def test_text_for_terminals(server: Running) -> None:
    with server.client() as http:
        answer = http.get("/")
        paths = http.get("/openapi.json").json()["paths"]
    assert answer.headers["content-type"].startswith("text/plain")
    assert all(path in answer.text for path in paths)
    assert MODEL in answer.text


def test_html_for_browsers(server: Running) -> None:
    with server.client() as http:
        answer = http.get("/", headers={"Accept": "text/html,application/xhtml+xml"})
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-frame-options"] == "DENY"
    assert "<code>/v1/completions</code>" in answer.text
    assert MODEL in answer.text


def test_names_cannot_bring_markup() -> None:
    page = as_html("ready", ["<script>alert(1)</script>"], [Route("GET", "/<b>", "<i>")])
    assert "<script>" not in page
    assert "<b>" not in page
    assert "<i>" not in page


def test_without_models() -> None:
    assert "deploy one with maveriq console" in as_text("ready", [], [])
    assert "deploy one with" in as_html("ready", [], [])
