"""Writes the folder of a study: table.csv, figures.csv, plot.png and plot.svg."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from maveriq.files import written_whole
from maveriq.report.run_folder import write_folder
from maveriq.study.analyses import Compared
from maveriq.study.plot import draw
from maveriq.study.result import Cell, StudyResult

STUDY_FILES = ("table.csv", "figures.csv", "plot.png", "plot.svg")
"""What makes a folder that of a study."""

_FIGURE_COLUMNS = ("figure", "ours", "published", "difference_percent", "what", "source", "why")


def write_study(
    folder: Path, title: str, result: StudyResult, compared: Sequence[Compared], *, overwrite: bool
) -> Path:
    """Write a study, whole or not at all; returns where it is (`maveriq.report.run_folder.write_folder`).

    Raises:
        InputError: the folder cannot be written, or holds something else.
        MaveriqError: the disk is full.
    """
    return write_folder(
        folder, lambda fresh: fill(fresh, title, result, compared), files=STUDY_FILES, overwrite=overwrite
    )


def fill(folder: Path, title: str, result: StudyResult, compared: Sequence[Compared]) -> None:
    """Write the files of a study into a folder that is there, each whole; files of an earlier result are replaced."""
    texts = {
        "table.csv": csv_text(result.table.columns, result.table.rows),
        "figures.csv": csv_text(_FIGURE_COLUMNS, _figure_rows(result, compared)),
    }
    for name, text in texts.items():
        with written_whole(folder / name, what="table of a study", overwrite=True) as partial:
            partial.write_text(text, encoding="utf-8")
    for name in ("plot.png", "plot.svg"):
        draw(folder / name, title, result.panels)


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """Return a table as the text of a CSV file."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows(["" if cell is None else cell for cell in row] for row in rows)
    return text.getvalue()


def _figure_rows(result: StudyResult, compared: Sequence[Compared]) -> Iterable[Sequence[Cell]]:
    """Yield the figures with a published value first, then the others."""
    for figure in compared:
        published = figure.published
        difference = 0.0 if figure.is_equal else round(figure.difference, 1)
        yield (
            published.figure, _rounded(figure.ours), published.value, difference, published.what, published.source,
            published.why,
        )  # fmt: skip
    known = {figure.published.figure for figure in compared}
    for name, value in result.figures.items():
        if name not in known:
            yield name, _rounded(value), None, None, None, None, None


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
