"""Simulate recorded serving runs from their descriptions, and print the errors of the simulation.

Usage: python experiments/serving/replay.py DATA_DIR [--runs TEXT] [--split fit|validate]

DATA_DIR contains `serving` and `models`. Nothing is fitted here: the constants are those of
`maveriq/data/engine_presets.toml`. An error is simulated over recorded less one, in percent.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from recorded_runs import RecordedRun, recorded_runs

import maveriq

FIGURES: dict[str, tuple[str, Callable[[np.ndarray], float]]] = {
    "TTFT p50": ("ttft_s", np.median),
    "TTFT mean": ("ttft_s", np.mean),
    "TTFT p99": ("ttft_s", lambda values: np.percentile(values, 99)),
    "TPOT mean": ("tpot_s", np.mean),
    "E2E mean": ("e2e_s", np.mean),
    "E2E p99": ("e2e_s", lambda values: np.percentile(values, 99)),
}


def main() -> None:
    """Simulate the chosen runs, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", default="", help="only runs whose name contains this")
    parser.add_argument("--split", choices=("fit", "validate"))
    options = parser.parse_args()
    _write(f"{'run':<46} {'split':<8} " + " ".join(f"{name:>17}" for name in FIGURES))
    for run in recorded_runs(options.data / "serving", options.data / "models"):
        if options.runs in run.name and options.split in (None, run.split):
            _write(f"{run.name[:46]:<46} {run.split:<8} " + " ".join(_compared(run)))


def _write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _compared(run: RecordedRun) -> list[str]:
    """Return for each figure the recorded milliseconds and the error of the simulated ones."""
    recorded = pd.DataFrame(
        {name: [getattr(request, name) for request in run.requests] for name in ("ttft_s", "tpot_s", "e2e_s")}
    )
    simulated = simulate(run)
    cells = []
    for column, figure in FIGURES.values():
        measured_s = figure(recorded[column].to_numpy())
        error = figure(simulated[column].to_numpy()) / measured_s - 1
        cells.append(f"{1e3 * measured_s:10.1f} {100 * error:+5.1f}%")
    return cells


def simulate(run: RecordedRun) -> pd.DataFrame:
    """Return the times of a run's requests as `maveriq sim` has them; all complete."""
    with tempfile.TemporaryDirectory() as folder:
        models, trace = run.write(Path(folder))
        result = maveriq.simulate(
            models=str(models),
            gpus=f"{run.tp}xH100-SXM",
            trace=str(trace),
            service_times="physics",
            max_in_flight=run.max_in_flight,
        )
    requests = result.requests
    assert (requests["status"] == "completed").all(), requests["reason"].unique()  # noqa: S101
    first_s = requests["first_token_s"] - requests["arrival_s"]
    return pd.DataFrame({"ttft_s": first_s, "tpot_s": requests["tpot_s"], "e2e_s": requests["latency_s"]})


if __name__ == "__main__":
    main()
