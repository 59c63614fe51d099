"""Draws the parts of a view for a terminal, with rich. Control characters of every text are escaped."""

from __future__ import annotations

import os
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group, RenderableType, RenderHook, RenderResult
from rich.markup import escape
from rich.panel import Panel as RichPanel
from rich.segment import Segment
from rich.table import Table as RichTable
from rich.text import Text as RichText

from maveriq.report.view import Cell, Column, Facts, Panel, Shown, Table, Text, View
from maveriq.text import escape_controls


def open_console(*, stderr: bool = False) -> Console:
    """Return a console that escapes control characters of whatever it prints.

    With NO_COLOR in the environment it writes no escape sequence of its own either.
    """
    console = Console(stderr=stderr, color_system=None if no_color() else "auto")
    console.push_render_hook(_EscapeControls())
    return console


class _EscapeControls(RenderHook):
    """Escapes the text of what is printed; rich's own control sequences are no text."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Escaped(renderable) for renderable in renderables]


@dataclass(frozen=True, slots=True)
class _Escaped:
    renderable: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.renderable, options):
            yield segment if segment.control else Segment(escape_controls(segment.text), segment.style)


def no_color() -> bool:
    """Return whether the user wants plain text (https://no-color.org)."""
    return bool(os.environ.get("NO_COLOR"))


def to_rich(part: Shown) -> RenderableType:
    """Return a part of a view as what a rich console prints."""
    match part:
        case Text():
            return _text(part)
        case Table():
            return _table(part)
        case Facts():
            return _facts(part)
        case Panel():
            return _panel(part)
        case View():
            return Group(*map(to_rich, part.parts))
        case _:
            raise TypeError(f"{type(part).__name__} is no part of a view")


def _text(text: Text) -> RichText:
    return RichText.assemble(*((escape_controls(span), style) for span, style in text.spans))


def _cell(cell: Cell) -> RichText:
    return RichText(escape_controls(cell)) if isinstance(cell, str) else _text(cell)


def empty_table(title: str = "", *, dense: bool = False) -> RichTable:
    """Return an empty rich table in the style that all tables share."""
    return RichTable(
        title=escape(escape_controls(title)) or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        header_style="dim",
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0) if dense else (0, 1),
    )


def _table(table: Table) -> RichTable:
    drawn = empty_table(table.title, dense=table.dense)
    for column in table.columns:
        _add_column(drawn, column)
    for row in table.rows:
        if row.starts_section:
            drawn.add_section()
        drawn.add_row(*map(_cell, row.cells), style=row.style)
    return drawn


def _add_column(table: RichTable, column: Column) -> None:
    table.add_column(
        RichText(escape_controls(column.header)),
        justify=column.align,
        style=column.style,
        no_wrap=column.wrap == "never",
        overflow="fold" if column.wrap == "fold" else "ellipsis",
        min_width=column.min_width,
        max_width=column.max_width,
    )


def _facts(facts: Facts) -> RichTable:
    grid = RichTable.grid(padding=(0, 2))
    for name, value in facts.pairs:
        grid.add_row(RichText(escape_controls(name), style="dim"), RichText(escape_controls(value)))
    return grid


def _panel(panel: Panel) -> RichPanel:
    return RichPanel(
        Group(*map(to_rich, panel.parts)),
        title=RichText(escape_controls(panel.title), style=f"bold {panel.style}"),
        title_align="left",
        border_style=panel.style,
        box=box.ROUNDED,
        padding=(0, 1),
        width=panel.width,
    )
