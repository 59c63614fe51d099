"""`maveriq report`: one self-contained HTML file for a run, a comparison, a sweep or a sizing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from maveriq.cli.options import OverwriteFlag
from maveriq.cli.output import echo
from maveriq.errors import InputError
from maveriq.files import check_file_writable, exists, is_folder
from maveriq.report.page.page import Page
from maveriq.report.page.render import check_installed, write_page


def report(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...",
            help="Folders of runs, names of recorded runs, the folder of a sweep, or a file of maveriq size --json.",
        ),
    ],
    *,
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="The file to write.")] = Path("report.html"),
    overwrite: OverwriteFlag = False,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The folder of recorded runs.", show_default="MAVERIQ_DATA"),
    ] = None,
) -> None:
    """Write one HTML file that shows a run, a comparison, a sweep or a sizing.

    The file holds everything that it shows, loads nothing, and works without
    a network: verdict, figures, interactive charts, tables, and the options as
    resolved. Of several runs, each is compared with the last. Needs
    maveriq[report].
    """
    check_file_writable(out, what="report", overwrite=overwrite)
    check_installed()
    write_page(_page(sources, data), out, overwrite=overwrite)
    echo(f"report: {out}")


def _page(sources: Sequence[str], data: Path | None) -> Page:
    """Return the page of a sweep, of a sizing, of a run, or of several runs."""
    others = [source for source in sources if _is_sweep(source) or _is_sizing(source)]
    if others and len(sources) > 1:
        raise InputError(f"{others[0]!r} is no run, and cannot be compared; report it by itself")
    if others and _is_sweep(others[0]):
        from maveriq.sweeps.page import sweep_page
        from maveriq.sweeps.run import load_sweep

        return sweep_page(load_sweep(Path(others[0])), name=Path(others[0]).name)
    if others:
        from maveriq.sizing.page import read_sizing, sizing_page

        return sizing_page(read_sizing(Path(others[0])), name=Path(others[0]).stem)
    from maveriq.report.page.comparison_page import comparison_page
    from maveriq.report.page.run_page import run_page
    from maveriq.runs import load_run

    if len(sources) == 1:
        return run_page(load_run(sources[0], data=data).results(Path(sources[0]).name))
    return comparison_page([load_run(source, data=data).results(source) for source in sources])


def _is_sweep(source: str) -> bool:
    return exists(Path(source) / "sweep.json")


def _is_sizing(source: str) -> bool:
    return source.endswith(".json") and exists(Path(source)) and not is_folder(Path(source))
