"""`maveriq study`: carries out a study on published measurements or on this machine's engines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from maveriq.cli.options import JsonFlag, OverwriteFlag
from maveriq.errors import InputError
from maveriq.report.formatting import figure as shown
from maveriq.report.formatting import signed
from maveriq.report.run_folder import check_writable
from maveriq.report.terminal import open_console
from maveriq.report.view import Cell, Column, Table, number_column, row
from maveriq.study.analyses import Compared, study_published
from maveriq.study.definition import known_studies, read_definition
from maveriq.study.folder import STUDY_FILES, write_study
from maveriq.study.result import StudyResult

LIST = "list"

_MIN_WIDTH = 8  # of a column of text; numbers are never cut


def study(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE.toml|list", help="A study, or `list` to list them.")],
    *,
    from_data: Annotated[bool, typer.Option("--from-data", help="Take published measurements.")] = False,
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The folder of them.", show_default="MAVERIQ_DATA")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results.", show_default="studies/NAME")] = None,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Study how models scale, and what measuring them costs.

    Leaves a table (CSV) and a plot (PNG and SVG), and compares its figures
    with published ones where there are any.
    """
    if name == LIST:
        _list(as_json=as_json)
        return
    name, definition = read_definition(name)
    if not from_data:
        raise InputError(f"study {name}: give --from-data")
    folder = out or Path("studies") / f"{name}-from-data"
    check_writable(folder, files=STUDY_FILES, overwrite=overwrite)
    result, compared = study_published(name, definition, data)
    written = write_study(folder, definition.title, result, compared, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps(_as_json(written, result, compared), indent=2, allow_nan=False))
        return
    _show(written, definition.title, result, compared)


def _list(*, as_json: bool) -> None:
    studies = {name: read_definition(name)[1] for name in known_studies()}
    if as_json:
        answer = [{"name": name, "question": found.question, "from_data": found.from_data is not None}
                  for name, found in studies.items()]  # fmt: skip
        typer.echo(json.dumps(answer, indent=2))
        return
    rows = [
        row(name, definition.question, "yes" if definition.from_data else "no") for name, definition in studies.items()
    ]
    open_console().print(Table("", [Column("study"), Column("question", wrap="words"), Column("--from-data")], rows))


def _as_json(folder: Path, result: StudyResult, compared: Sequence[Compared]) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "rows": [dict(zip(result.table.columns, cells, strict=True)) for cells in result.table.rows],
        "figures": dict(result.figures),
        "published": [
            {
                "figure": found.published.figure,
                "ours": found.ours,
                "published": found.published.value,
                "equal_as_printed": found.is_equal,
                "difference_percent": found.difference,
                "source": found.published.source,
                "why": found.published.why,
            }
            for found in compared
        ],
        "notes": list(result.notes),
    }


def _show(folder: Path, title: str, result: StudyResult, compared: Sequence[Compared]) -> None:
    console = open_console()
    columns = [_column(index, result) for index in range(len(result.table.columns))]
    console.print(Table(title, columns, [row(*map(_cell, cells)) for cells in result.table.rows], dense=True))
    if compared:
        headers = [Column("figure"), number_column("ours"), number_column("published"), number_column("difference")]
        console.print(Table("Beside published figures", headers, [row(*_compared(found)) for found in compared]))
    for line in (*_reasons(compared), *result.notes, f"results: {folder}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _column(index: int, result: StudyResult) -> Column:
    header = result.table.columns[index].replace("_", "\n")
    if any(isinstance(cells[index], str) for cells in result.table.rows):
        return Column(header, wrap="words", min_width=_MIN_WIDTH)
    return number_column(header)


def _cell(cell: str | float | None) -> Cell:
    if isinstance(cell, float):
        return shown(cell)
    return "" if cell is None else str(cell)


def _compared(found: Compared) -> tuple[Cell, ...]:
    difference = "as printed" if found.is_equal else signed(found.difference, "%")
    return found.published.figure, shown(found.ours), str(found.published.value), difference


def _reasons(compared: Sequence[Compared]) -> Iterator[str]:
    for found in compared:
        if not found.is_equal and found.published.why:
            yield f"{found.published.figure}: {found.published.why}"
