"""Write maveriq/data/a6000/recorded-runs.csv: a row of figures for each recorded run of the published testbed.

Usage: python scripts/derive_recorded_runs.py [--data DIR]

The recordings were published with the MaverIQ paper (SC '25; repository UT-SysML/MaverIQ on GitHub, `outputs/`). The
folder of measured data (default: MAVERIQ_DATA) holds them in testbed/. Figures are those of `maveriq.Run.metrics`.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from maveriq.estimate.hardware_profile import load_profile
from maveriq.experiment.recorded import FIGURE_COLUMNS, KEY_COLUMNS, runs_in
from maveriq.files import data_path
from maveriq.testbed.recordings import find_testbed


def main() -> None:
    """Derive the figures and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of measured data (default: MAVERIQ_DATA)")
    testbed = find_testbed(parser.parse_args().data)
    with data_path("a6000", "recorded-runs.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*KEY_COLUMNS, *FIGURE_COLUMNS])
        for run in runs_in(testbed, load_profile("a6000-short")):
            figures = (run.figures[name] for name in FIGURE_COLUMNS)
            table.writerow(
                [run.run, *run.key, run.saturation, *("" if value is None else f"{value:.6g}" for value in figures)]
            )


if __name__ == "__main__":
    main()
