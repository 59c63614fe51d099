"""Count the recorded requests that met their SLO, for every recorded run with SLOs, and write the counts as CSV.

Usage: python experiments/alpaserve/recorded_slo.py [--data DIR] [--out FILE]

The counts go to experiments/alpaserve/results/recorded_slo.csv. DIR is the folder of measured data (default:
MAVERIQ_DATA). The SLO of a run is its scale times the constants per model that `maveriq sim --slo-scale` uses, for 20
output tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "published"))

from recordings import SLO_COLUMNS

from maveriq.errors import MaveriqError
from maveriq.estimate.hardware_profile import HardwareProfile, load_profile
from maveriq.files import measured_data_path
from maveriq.testbed.recordings import Completed, RecordedRun, read_completed, read_runs, read_scheduled
from maveriq.units import MICROS_PER_SECOND

_RESULTS = Path(__file__).parent / "results" / "recorded_slo.csv"
_OUTPUT_TOKENS = 20
"""Each recorded request has this many output tokens."""


def recorded_slo_csv(data: Path) -> str:
    """Return the counts as CSV: run, scheduled, completed, met.

    Args:
        data: the folder of measured data.

    Raises:
        InputError: a file is missing or invalid.
    """
    return "".join(f"{','.join(row)}\n" for row in [SLO_COLUMNS, *_rows(data / "testbed")])


def _rows(testbed: Path) -> Iterator[tuple[str, ...]]:
    profile = load_profile("a6000-short")
    scheduled, completed = read_scheduled(testbed), read_completed(testbed)
    for run in read_runs(testbed):
        if run.slo_scale:
            done = completed[run.name]
            counts = (len(scheduled[run.name].arrival_us), len(done.arrival_us), _met(run, done, profile))
            yield (run.name, *map(str, counts))


def _met(run: RecordedRun, done: Completed, profile: HardwareProfile) -> int:
    met = 0
    for deployment in run.deployments:
        base_s = profile.slo_s(deployment.model_name, _OUTPUT_TOKENS)
        if base_s is not None:
            latency_us = done.latency_us[done.endpoint_id == deployment.endpoint_id]
            met += int((latency_us <= run.slo_scale * base_s * MICROS_PER_SECOND).sum())
    return met


def main(arguments: list[str]) -> None:
    """Write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=measured_data_path(), metavar="DIR", help="folder of measured data"
    )
    parser.add_argument("--out", type=Path, default=_RESULTS, metavar="FILE", help="default: results/recorded_slo.csv")
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("the measured data is absent; name its folder with --data or MAVERIQ_DATA")
    try:
        options.out.write_text(recorded_slo_csv(options.data), encoding="utf-8", newline="")
    except MaveriqError as error:
        parser.exit(error.exit_code, f"error: {error}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
