"""Simulate every recorded run from its description alone, and compare it with its recording, request by request.

Usage: python experiments/fidelity/blind.py [--data DIR] [--out DIR] [--page FILE]

Tables are printed, written with pictures to experiments/fidelity/results/, and put into docs/fidelity.md, which
explains them. --data names the folder of measured data (default: MAVERIQ_DATA).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

sys.path.append(str(Path(__file__).parents[1] / "alpaserve"))

from blind_contention import Contention
from blind_grids import grids
from blind_placement import placement_rows
from blind_plan import BlindPlan, load_blind_plan
from blind_plots import draw_overview, draw_run, write_gallery
from blind_runs import PROFILE, blind_results
from blind_tables import BlindTables, read_tables, write_tables
from grids import Grid
from page import filled
from rich.console import Console
from rich.progress import track

from maveriq.errors import MaveriqError
from maveriq.estimate.hardware_profile import load_profile
from maveriq.files import measured_data_path
from maveriq.testbed.recordings import find_testbed, read_runs

_HERE = Path(__file__).parent
_RESULTS = _HERE / "results"
_PAGE = _HERE.parents[1] / "docs" / "fidelity.md"
PICTURES = "runs"
_WIDTH_OF_NO_TERMINAL = 200
_Item = TypeVar("_Item")


def main(arguments: list[str]) -> None:
    """Simulate, write results and pictures, update the page, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=measured_data_path(), metavar="DIR", help="folder of measured data"
    )
    parser.add_argument("--plan", type=Path, default=_HERE / "blind.toml", metavar="FILE", help="settings and bars")
    parser.add_argument(
        "--out", type=Path, default=_RESULTS, metavar="DIR", help="folder of the results (default: results)"
    )
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="page whose tables are replaced (default: docs/fidelity.md, or none with --out)",
    )
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("the measured data is absent; name its folder with --data or MAVERIQ_DATA")
    page = options.page or (_PAGE if options.out == _RESULTS else None)
    try:
        plan = load_blind_plan(options.plan)
        _run_all(options.data, plan, options.out)
        tables = page_grids(options.out, plan)
        if page:
            page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8", newline="")
    except MaveriqError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_NO_TERMINAL)
    for grid in tables:
        console.print(grid.table())


def page_grids(results: Path, plan: BlindPlan) -> list[Grid]:
    """Return the tables of the results in a folder, in the order in which they are printed.

    Raises:
        InputError: a file is missing or invalid.
    """
    return list(grids(read_tables(results), plan))


def _run_all(data: Path, plan: BlindPlan, out: Path) -> None:
    """Simulate everything, and write the results and pictures."""
    pictures = out / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    runs = {run.name: run for run in read_runs(find_testbed(data))}
    kept, contention = [], Contention()
    for result in _shown(blind_results(data, plan), "Recorded runs", len(runs)):
        contention.add(result.recorded, result.sim)
        kept.append((result.row, result.services, result.elsewhere, result.gain))
        draw_run(pictures, result.row.run, result.sim, result.recorded, result.comparison)
    tables = BlindTables(
        runs=[row for row, *_ in kept],
        services=[service for _, services, *_ in kept for service in services],
        elsewhere=[row for _, _, rows, _ in kept for row in rows],
        gains=[gain for *_, gain in kept if gain],
        contention=list(contention.rows()),
        placements=list(placement_rows(data, load_profile(PROFILE), plan.placement_draws)),
    )
    write_tables(out, tables)
    write_gallery(pictures, list(runs))
    draw_overview(out / "overview.png", tables.runs, plan.bars)


def _shown(found: Iterable[_Item], what: str, total: int) -> Iterable[_Item]:
    return track(found, what, total=total, console=Console(stderr=True), transient=True)


if __name__ == "__main__":
    main(sys.argv[1:])
