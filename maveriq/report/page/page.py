"""What stands on the page of a report: a verdict, cards, sections of charts and tables, options to copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from maveriq.report.page.charts import Chart, models_of
from maveriq.report.view import Row, Table, Text


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A figure that a reader looks for first: what it is, its value, and what it rests on."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer in a line, and sentences below it; `tone` is good, fair, poor or neutral, as `headline` says."""

    headline: str
    sentences: Sequence[str]
    tone: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page with a heading."""

    section_id: str
    title: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snippet:
    """A text to copy, such as the options of a run."""

    title: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A report.

    Args:
        title: of the page.
        subtitle: what the results are of.
        kind: what was reported: "run", "comparison", "sweep" or "sizing".
        verdicts: the answers, one for each run or kind of GPU.
        cards: figures.
        sections: charts and tables.
        notes: what a reader must know.
        snippets: texts to copy.
        written_by: the versions that made the results.
    """

    title: str
    subtitle: str
    kind: str
    verdicts: Sequence[Verdict]
    cards: Sequence[Card]
    sections: Sequence[Section]
    notes: Sequence[str] = ()
    snippets: Sequence[Snippet] = ()
    written_by: str = ""

    @property
    def charts(self) -> list[Chart]:
        """All charts, in their order."""
        return [chart for section in self.sections for chart in section.charts]

    @property
    def models(self) -> dict[str, int]:
        """The models that can be hidden, with their styles."""
        return models_of(self.charts)


def table_sections(table: Table) -> Iterator[list[Row]]:
    """Yield the rows of a table, cut where a row starts a section."""
    section: list[Row] = []
    for row in table.rows:
        if row.starts_section and section:
            yield section
            section = []
        section.append(row)
    if section:
        yield section


def cell_spans(cell: str | Text) -> tuple[tuple[str, str], ...]:
    """Return the texts of a cell with their styles."""
    return ((cell, ""),) if isinstance(cell, str) else cell.spans
