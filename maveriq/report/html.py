"""Draws the parts of a view as HTML for notebooks. Every text is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from itertools import chain

from maveriq.report.view import Cell, Facts, Panel, Row, Shown, Table, Text, View

_CSS = """
.maveriq table { border-collapse: collapse; margin: 0.3em 0 0.9em; font-variant-numeric: tabular-nums; }
.maveriq caption { caption-side: top; text-align: left; font-weight: bold; padding: 0.2em 0; white-space: nowrap; }
.maveriq th { font-weight: normal; opacity: 0.65; vertical-align: bottom; border-bottom: 1px solid; }
.maveriq th, .maveriq td { padding: 0.15em 0.7em; text-align: left; background: none; }
.maveriq .right { text-align: right; }
.maveriq tbody + tbody { border-top: 1px solid #8888; }
.maveriq p { margin: 0.2em 0; white-space: pre-wrap; }
.maveriq section { border: 1px solid #8888; border-left-width: 4px; padding: 0.4em 0.9em; max-width: 60em; }
.maveriq .bold { font-weight: bold; }
.maveriq .dim { opacity: 0.65; }
.maveriq .green { color: #2e8b57; }
.maveriq .yellow { color: #b8860b; }
.maveriq .red { color: #d0342c; }
.maveriq .cyan { color: #1c8ca8; }
"""


def to_html(part: Shown) -> str:
    """Return a part of a view as one HTML element with its own style sheet."""
    return f'<div class="maveriq"><style>{_CSS}</style>{_element(part)}</div>'


def _element(part: Shown) -> str:
    match part:
        case Text():
            return f"<p>{_spans(part)}</p>" if part.plain.strip() else ""
        case Table():
            return _table(part)
        case Facts():
            rows = "".join(
                f'<tr><td class="dim">{escape(name)}</td><td>{escape(value)}</td></tr>' for name, value in part.pairs
            )
            return f"<table><tbody>{rows}</tbody></table>"
        case Panel():
            title = Text(part.title, f"bold {part.style}")
            return f"<section>{''.join(map(_element, chain((title,), part.parts)))}</section>"
        case View():
            return "".join(map(_element, part.parts))
        case _:
            raise TypeError(f"{type(part).__name__} is no part of a view")


def _spans(text: Text) -> str:
    return "".join(
        f'<span class="{escape(style)}">{escape(piece)}</span>' if style else escape(piece)
        for piece, style in text.spans
    )


def _table(table: Table) -> str:
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    headers = "".join(
        f"<th{_class(column.align)}>{escape(column.header).replace(chr(10), '<br>')}</th>" for column in table.columns
    )
    bodies = "".join(f"<tbody>{''.join(_row(table, row) for row in rows)}</tbody>" for rows in _sections(table.rows))
    return f"<table>{caption}<thead><tr>{headers}</tr></thead>{bodies}</table>"


def _sections(rows: Iterable[Row]) -> list[list[Row]]:
    sections: list[list[Row]] = [[]]
    for row in rows:
        if row.starts_section and sections[-1]:
            sections.append([])
        sections[-1].append(row)
    return sections


def _row(table: Table, row: Row) -> str:
    cells = (
        f"<td{_class(column.align, column.style)}>{_cell(cell)}</td>"
        for column, cell in zip(table.columns, row.cells, strict=True)
    )
    return f"<tr{_class('left', row.style)}>{''.join(cells)}</tr>"


def _cell(cell: Cell) -> str:
    return escape(cell) if isinstance(cell, str) else _spans(cell)


def _class(align: str, style: str = "") -> str:
    names = " ".join(filter(None, ("right" if align == "right" else "", style)))
    return f' class="{escape(names)}"' if names else ""
