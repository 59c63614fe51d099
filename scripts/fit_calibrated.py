"""Fit the calibrated estimator to the published A6000 measurements.

Usage: python scripts/fit_calibrated.py DATA_DIR [--out FOLDER]

DATA_DIR contains `a6000` (fingerprints and full-model measurements) and `testbed` (recorded runs). The script writes
`calibrated.toml`, one `calibrated-without-MODEL.toml` per fully measured model, and `calibrated-served.csv` (the
figures of the live system, each recorded run left out in turn) to maveriq/data/a6000. Equal data gives equal files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from maveriq.calibration.cross_validation import cross_fit
from maveriq.calibration.fitting import start_calibration
from maveriq.calibration.online import cross_fit_online
from maveriq.calibration.samples import read_samples
from maveriq.estimate.calibrated import CalibratedEstimator
from maveriq.estimate.calibration_file import Calibration, online_csv, to_toml
from maveriq.estimate.hardware_profile import load_profile
from maveriq.files import data_path
from maveriq.testbed.engines import read_engines

_COMMENT = """Written by scripts/fit_calibrated.py: figures of the calibrated estimator (docs/calibrated.md), fitted to
the fingerprints and full-model measurements published with the MaverIQ paper (SC '25; repository UT-SysML/MaverIQ,
outputs/){without}. [served] is fitted to the recorded runs of the live system."""


def main() -> None:
    """Fit and write all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="folder that contains a6000 and testbed")
    parser.add_argument("--out", type=Path, default=data_path("a6000"), help="output folder (default: the package)")
    arguments = parser.parse_args()
    samples = read_samples(arguments.data_dir / "a6000")
    fitted = cross_fit(samples, start_calibration(), on_fit=print)
    engines = read_engines(arguments.data_dir / "testbed")
    benchmarked = CalibratedEstimator(load_profile("a6000-short"), fitted.calibration, online=False)
    online, without_run = cross_fit_online(benchmarked.layer_time_ratio, fitted.calibration, engines)
    (arguments.out / "calibrated-served.csv").write_text(online_csv(without_run), encoding="utf-8")
    write(arguments.out / "calibrated.toml", msgspec.structs.replace(fitted.calibration, online=online), "")
    for model, calibration in fitted.without.items():
        without = f"; full models of {model} left out"
        write(arguments.out / f"calibrated-without-{model}.toml", calibration, without)


def write(path: Path, calibration: Calibration, without: str) -> None:
    """Write a calibration with a comment about its source."""
    path.write_text(to_toml(calibration, _COMMENT.format(without=without)), encoding="utf-8")


if __name__ == "__main__":
    main()
