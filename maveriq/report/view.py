"""What maveriq shows, as data: text, tables and panels, without a word on how they are drawn.

`maveriq.report.terminal` draws views with rich, `maveriq.report.html` as HTML. Both are imported on
use: `rich.print(view)` and Jupyter call `__rich__` and `_repr_html_`, which every part has.

A style is words separated by spaces: `bold`, `dim` and one colour of `COLOURS`. A text is always
literal: no part reads markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from rich.console import RenderableType

COLOURS = ("green", "yellow", "red", "cyan")


class Shown:
    """A part of a view: it displays itself on a rich console and in a notebook."""

    __slots__ = ()

    def __rich__(self) -> RenderableType:
        """Return the part for a rich console."""
        from maveriq.report.terminal import to_rich

        return to_rich(self)

    def _repr_html_(self) -> str:
        """Return the part for a notebook."""
        from maveriq.report.html import to_html

        return to_html(self)


@dataclass(frozen=True, slots=True, init=False)
class Text(Shown):
    """A text of one or more spans, each a plain text and its style; it may have several lines.

    `Text("note ", "bold")` has one span; `Text.of(("note ", "bold"), "all is well")` has two.
    """

    spans: tuple[tuple[str, str], ...]

    def __init__(self, text: str = "", style: str = "") -> None:
        object.__setattr__(self, "spans", ((text, style),))

    @classmethod
    def of(cls, *parts: str | tuple[str, str] | Text) -> Text:
        """Return a text joined of plain texts, pairs of text and style, and texts."""
        joined = cls()
        object.__setattr__(joined, "spans", tuple(span for part in parts for span in _spans(part)))
        return joined

    @property
    def plain(self) -> str:
        """The text without styles."""
        return "".join(text for text, _ in self.spans)


def _spans(part: str | tuple[str, str] | Text) -> tuple[tuple[str, str], ...]:
    if isinstance(part, Text):
        return part.spans
    return ((part, ""),) if isinstance(part, str) else (part,)


BLANK = Text()
"""An empty line between parts."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Args:
        header: its header, which may have two lines.
        align: of its cells and its header.
        style: of its cells.
        wrap: where lines may break: between words, never, or anywhere ("fold").
        min_width: in characters, on a terminal.
        max_width: in characters, on a terminal.
    """

    header: str
    align: Literal["left", "right"] = "left"
    style: str = ""
    wrap: Literal["words", "never", "fold"] = "never"
    min_width: int | None = None
    max_width: int | None = None


def number_column(header: str) -> Column:
    """Return a column of numbers: right-aligned and never wrapped."""
    return Column(header, align="right")


Cell: TypeAlias = str | Text


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table; `starts_section` draws a line above it, unless it is the first."""

    cells: tuple[Cell, ...]
    style: str = ""
    starts_section: bool = False


def row(*cells: Cell, style: str = "", starts_section: bool = False) -> Row:
    """Return a row of cells."""
    return Row(cells, style, starts_section)


@dataclass(frozen=True, slots=True)
class Table(Shown):
    """A table with a title; each row has a cell per column. `dense` leaves less room between columns."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    dense: bool = False


@dataclass(frozen=True, slots=True)
class Facts(Shown):
    """Names and values, a line each, without a header."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Panel(Shown):
    """Parts in a frame with a title; `style` is of the frame and the title, `width` in characters, on a terminal."""

    title: str
    parts: Sequence[Part]
    style: str
    width: int


@dataclass(frozen=True, slots=True)
class View(Shown):
    """Parts one below the other, without space between them: `BLANK` makes an empty line."""

    parts: Sequence[Part]


Part: TypeAlias = Text | Table | Facts | Panel | View


def spaced(parts: Iterable[Part]) -> list[Part]:
    """Return the parts with an empty line after each."""
    return [piece for part in parts for piece in (part, BLANK)]


_COLUMN_GAP, _DENSE_GAP = 3, 2


def natural_width(table: Table) -> int:
    """Return how many characters a table takes where no cell is broken or cut."""
    widths = [_natural_width(table, position) for position in range(len(table.columns))]
    return sum(widths) + (len(widths) - 1) * (_DENSE_GAP if table.dense else _COLUMN_GAP)


def fit_width(table: Table, width: int) -> list[Table]:
    """Return a table as one or several of at most `width` characters, each with the first column.

    So no cell is broken or cut, unless the first column and one other do not fit together.
    """
    widths = [_natural_width(table, position) for position in range(len(table.columns))]
    groups: list[list[int]] = [[]]
    room = width - widths[0]
    for position in range(1, len(widths)):
        needed = widths[position] + _COLUMN_GAP
        if groups[-1] and needed > room:
            groups.append([])
            room = width - widths[0]
        groups[-1].append(position)
        room -= needed
    if len(groups) == 1:
        return [table]
    return [_part(table, [0, *group], f"{table.title} ({number} of {len(groups)})") for number, group in
            enumerate(groups, start=1)]  # fmt: skip


def _natural_width(table: Table, position: int) -> int:
    cells = [row.cells[position] for row in table.rows]
    texts = [table.columns[position].header, *(cell if isinstance(cell, str) else cell.plain for cell in cells)]
    return max(len(line) for text in texts for line in text.split("\n"))


def _part(table: Table, positions: Sequence[int], title: str) -> Table:
    rows = [Row(tuple(row.cells[at] for at in positions), row.style, row.starts_section) for row in table.rows]
    return Table(title, [table.columns[at] for at in positions], rows, table.dense)
