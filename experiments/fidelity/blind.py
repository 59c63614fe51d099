"""Simulate every recorded run from its description, print how far off that is, and fill in the page.

Usage: python experiments/fidelity/blind.py [--data DIR] [--out DIR] [--page FILE]

DIR is the folder of measured data (else MAVERIQ_DATA). docs/fidelity.md tells what the tables mean.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "alpaserve"))

from blind_grids import grids
from blind_neighbours import Neighbours
from blind_placement import placement_rows
from blind_plan import BlindPlan, load_blind_plan
from blind_runs import PROFILE, BlindResult, blind_results
from blind_tables import BlindTables, read_tables, write_tables
from page import filled
from rich.console import Console
from rich.progress import track

from maveriq.embedded import measured_data_path
from maveriq.errors import MaveriqError
from maveriq.estimate.hardware import load_profile
from maveriq.report.compare_plot import write_plot
from maveriq.report.curves import latency_curves, queue_curves

_HERE = Path(__file__).parent
_RESULTS = _HERE / "results"
_PAGE = _HERE.parents[1] / "docs" / "fidelity.md"
_WIDTH_OF_NO_TERMINAL = 200
_POINTS = 400


def main(arguments: list[str]) -> None:
    """Simulate, write results and plot, fill in the page, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=measured_data_path(), metavar="DIR")
    parser.add_argument("--plan", type=Path, default=_HERE / "blind.toml", metavar="FILE")
    parser.add_argument("--out", type=Path, default=_RESULTS, metavar="DIR")
    parser.add_argument("--page", type=Path, metavar="FILE", help="default: that of the docs, unless --out is given")
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("the measured data is absent; name its folder with --data or MAVERIQ_DATA")
    page = options.page or (_PAGE if options.out == _RESULTS else None)
    try:
        plan = load_blind_plan(options.plan)
        write_tables(options.out, _run_all(options.data, plan, options.out))
        tables = list(grids(read_tables(options.out), plan))
        if page:
            page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8", newline="")
    except MaveriqError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_NO_TERMINAL)
    for grid in tables:
        console.print(grid.table())


def _run_all(data: Path, plan: BlindPlan, out: Path) -> BlindTables:
    """Return the tables of all runs, and plot the run that `plan` names."""
    kept, neighbours = [], Neighbours()
    for one in track(blind_results(data, plan), "Simulating", console=Console(stderr=True), transient=True):
        if one.row.run == plan.plotted:
            _plot(one, out)
        neighbours.add(one.recorded, one.sim)
        kept.append((one.row, one.services, one.elsewhere, one.gain))
    return BlindTables(
        runs=[row for row, *_ in kept],
        services=[service for _, services, *_ in kept for service in services],
        elsewhere=[row for _, _, rows, _ in kept for row in rows],
        gains=[gain for *_, gain in kept if gain],
        neighbours=list(neighbours.rows()),
        placements=list(placement_rows(data, load_profile(PROFILE), plan.placement_draws)),
    )


def _plot(one: BlindResult, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    latencies = latency_curves(one.sim, one.recorded, points=_POINTS)
    queues = queue_curves(one.sim, one.recorded, points=_POINTS)
    write_plot(
        out / "overlay.png",
        one.comparison,
        [curves for curves in (latencies, queues) if curves],
        title=f"{one.row.run}, simulated blind",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
