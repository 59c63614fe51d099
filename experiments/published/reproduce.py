"""Compare maveriq with the published recordings: estimates, schedules, configurations and the queue model.

Usage: python experiments/published/reproduce.py [--data DIR] [--out DIR]

Four tables are printed, and written as CSV to experiments/published/results/. --data names the folder of measured data
(default: MAVERIQ_DATA). docs/fidelity.md explains the figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from configurations import compare_all
from estimates import evaluate_all
from queue_model import read_recordings, replay_all
from rich.console import Console
from schedules import redraw_all
from sheets import Sheet, configurations_sheet, estimates_sheet, queue_sheet, schedules_sheet

from maveriq.errors import MaveriqError
from maveriq.files import measured_data_path

_RESULTS = Path(__file__).parent / "results"
_WIDTH_OF_NO_TERMINAL = 160


def sheets(data: Path) -> Iterator[Sheet]:
    """Yield the sheets, each as soon as it is computed.

    Args:
        data: the folder of measured data.
    """
    yield estimates_sheet(evaluate_all(data))
    yield schedules_sheet(list(redraw_all(data)))
    yield configurations_sheet(list(compare_all(data)))
    yield queue_sheet(list(replay_all(read_recordings(data))))


def main(arguments: list[str]) -> None:
    """Print and write the sheets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=measured_data_path(), metavar="DIR", help="folder of measured data"
    )
    parser.add_argument(
        "--out", type=Path, default=_RESULTS, metavar="DIR", help="folder of the results (default: results)"
    )
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("the measured data is absent; name its folder with --data or MAVERIQ_DATA")
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_NO_TERMINAL)
    try:
        for sheet in sheets(options.data):
            (options.out / f"{sheet.name}.csv").write_text(sheet.csv(), encoding="utf-8", newline="")
            console.print(sheet.table())
    except MaveriqError as error:
        parser.exit(error.exit_code, f"error: {error}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
