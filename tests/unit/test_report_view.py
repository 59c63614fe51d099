"""Views drawn for a terminal and as HTML."""

import io
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_report_results import a_run

from maveriq.report.html import to_html
from maveriq.report.metrics import summarise
from maveriq.report.results import results_view
from maveriq.report.saturation import assess_saturation
from maveriq.report.view import BLANK, Column, Facts, Panel, Shown, Table, Text, View, fit_width, number_column, row

TABLE = Table(
    "Models <b>",
    [Column("model"), number_column("latency s\nmean")],
    [row("a & b", "1.5"), row("c", Text("2.5", "red")), row("all", "2.0", style="bold", starts_section=True)],
)


class Texts(HTMLParser):
    """Collects the texts of the elements, and checks that each end tag closes the open element."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)


def texts(part: Shown) -> str:
    parser = Texts()
    parser.feed(to_html(part))
    assert not parser.open
    return "".join(parser.texts)


def printed(part: Shown, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(part)
    return out.getvalue()


def test_html_of_a_table_has_its_title_sections_and_classes():
    html = to_html(TABLE)
    assert "<caption>Models &lt;b&gt;</caption>" in html
    assert '<th class="right">latency s<br>mean</th>' in html
    assert "<td>a &amp; b</td>" in html
    assert '<td class="right"><span class="red">2.5</span></td>' in html
    assert html.count("<tbody>") == 2
    assert '<tr class="bold"><td>all</td>' in html


@given(st.text())
def test_html_shows_any_text_literally(text):
    parts = [Text.of("x", (text, "bold")), Facts([(text, text)]), Panel(text, [Text(text)], "red", 40)]
    shown = texts(View([*parts, BLANK, Table(text, [Column(text)], [row(text)])]))
    assert shown.count("<") >= text.count("<")
    if text.strip() and not set(text) & set("\r\0\n"):
        assert text in shown


@given(st.text(st.characters(exclude_categories=["C", "Z", "M"]), min_size=1, max_size=20))
def test_a_terminal_shows_markup_literally(text):
    shown = printed(View([Text(f"[bold]{text}"), Table("t", [Column("c")], [row(f"[red]{text}")])]), width=200)
    assert f"[bold]{text}" in shown
    assert f"[red]{text}" in shown


def test_results_are_the_same_on_a_terminal_and_in_a_notebook():
    run = a_run()
    view = results_view(summarise(run), assess_saturation(run), run.deployments)
    terminal, notebook = printed(view, width=200), texts(view)
    for word in ("Deployments", "Requests and cost", "huge-180b", "fits nowhere [at all]", "throughput", "GPU hours"):
        assert word in terminal
        assert word in notebook
    assert view._repr_html_() == to_html(view)


def test_only_parts_of_a_view_are_drawn():
    class Other(Shown):
        pass

    with pytest.raises(TypeError, match="Other is no part of a view"):
        to_html(Other())
    with pytest.raises(TypeError, match="Other is no part of a view"):
        Other().__rich__()


def test_a_table_that_is_too_wide_is_split_and_breaks_no_name() -> None:
    names = ["a-model-with-a-name-of-forty-characters!", "short"]
    columns = [Column("\nmodel"), *(number_column(f"column {number}\nunit") for number in range(8))]
    table = Table("Figures", columns, [row(name, *["1,234"] * 8) for name in names])
    parts = fit_width(table, 80)
    assert [part.title for part in parts] == ["Figures (1 of 3)", "Figures (2 of 3)", "Figures (3 of 3)"]
    assert sum(len(part.columns) - 1 for part in parts) == 8
    for part in parts:
        console = Console(width=80, file=io.StringIO())
        console.print(part)
        lines = console.file.getvalue().splitlines()
        assert max(map(len, lines)) <= 80
        assert any(names[0] in line for line in lines)
    assert fit_width(table, 200) == [table]
