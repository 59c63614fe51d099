"""Simulate MaverIQ, AlpaServe and AlpaServe* on the workloads of comparison.toml, and print tables of the results.

Usage: python experiments/alpaserve/compare.py [--comparison FILE] [--out DIR] [--page FILE]

The results go to experiments/alpaserve/results/, the tables also into docs/alpaserve.md. No measured data is needed.
experiments/README.md explains the columns of the results.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from cases import Case, load_comparison
from grids import Grid, grids, recorded_grid
from outcomes import Outcome, outcome_of, read_outcomes, to_csv
from page import filled
from recordings import Recorded, read_recorded
from rich.console import Console
from rich.progress import track

from maveriq.errors import InputError, MaveriqError

_HERE = Path(__file__).parent
_RESULTS = _HERE / "results"
_PAGE = _HERE.parents[1] / "docs" / "alpaserve.md"
_RECORDED_LATENCIES = _HERE.parent / "published" / "results" / "queue_model.csv"
_WIDTH_OF_NO_TERMINAL = 160
_CASES_AT_A_TIME = 8


def recorded_runs() -> Sequence[Recorded]:
    """Return the recorded runs, which are also simulated."""
    return list(read_recorded(_RECORDED_LATENCIES, _RESULTS / "recorded_slo.csv"))


def page_grids(results: Path) -> list[Grid]:
    """Return the tables of the results in a folder, in the order in which they are printed."""
    pairs = zip(recorded_runs(), read_outcomes(results / "recorded.csv"), strict=True)
    return [*grids(read_outcomes(results / "comparison.csv")), recorded_grid(pairs)]


def main(arguments: list[str]) -> None:
    """Run all cases, write their results, print them and fill in the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--comparison",
        type=Path,
        default=_HERE / "comparison.toml",
        metavar="FILE",
        help="what to compare (default: comparison.toml)",
    )
    parser.add_argument(
        "--out", type=Path, default=_RESULTS, metavar="DIR", help="folder of the results (default: results)"
    )
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="page whose tables are replaced (default: docs/alpaserve.md, or none with --out)",
    )
    options = parser.parse_args(arguments)
    page = options.page or (_PAGE if options.out == _RESULTS else None)
    try:
        compared = list(load_comparison(options.comparison).cases())
        recorded = [run.case() for run in recorded_runs()]
        outcomes = _outcomes([*compared, *recorded])
        options.out.mkdir(parents=True, exist_ok=True)
        _write(options.out / "comparison.csv", to_csv(outcomes[: len(compared)]))
        _write(options.out / "recorded.csv", to_csv(outcomes[len(compared) :]))
        tables = page_grids(options.out)
        if page:
            _write(page, filled(page.read_text(encoding="utf-8"), tables))
    except MaveriqError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_NO_TERMINAL)
    for grid in tables:
        console.print(grid.table())


def _outcomes(cases: Sequence[Case]) -> list[Outcome]:
    """Simulate all cases on all cores, and return the outcomes in the order of the cases.

    Raises:
        InputError: the first error of a case.
    """
    outcomes = []
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        found = workers.map(_outcome_or_error, cases, chunksize=_CASES_AT_A_TIME)
        for outcome in track(found, "Simulating", total=len(cases), console=Console(stderr=True), transient=True):
            if isinstance(outcome, str):
                workers.shutdown(wait=False, cancel_futures=True)
                raise InputError(outcome)
            outcomes.append(outcome)
    return outcomes


def _outcome_or_error(case: Case) -> Outcome | str:
    """Return the outcome, or the message of an error, because not every error can be pickled."""
    try:
        return outcome_of(case)
    except MaveriqError as error:
        return f"{case.variant.name}, {case.model_set}, {case.trace}: {error}"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="")


if __name__ == "__main__":
    main(sys.argv[1:])
