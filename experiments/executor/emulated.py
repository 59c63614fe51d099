"""Run the code trace on emulated engines with `maveriq run`, and compare the run with its simulation.

Usage: python experiments/executor/emulated.py [--time-scale 0.2] [--runs DIR] [--out DIR]

The results go to experiments/executor/results/. --runs keeps the run folders, and compares folders that exist without
running again. The exit code is 1 if mean or p95 latency differs by more than 5 %, or if a deployment differs.

Both runs sample the load of all GPUs at the same instant. With sampling phases, as on real GPUs, the loads of equally
busy GPUs differ randomly, and a millisecond decides where a deployment is placed.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from maveriq.files import data_path

_RESULTS = Path(__file__).parent / "results"
_BAR_PERCENT = 5.0
# Emulated engines do not slow each other down; the calibrated estimator's simulated ones do.
_OPTIONS = ("--estimator", "paper", "--service-times", "paper")


def main(arguments: list[str]) -> int:
    """Run, compare, write, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time-scale", type=float, default=0.2, help="real seconds per second of the run")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="folder in which to keep the run folders")
    parser.add_argument(
        "--out", type=Path, default=_RESULTS, metavar="DIR", help="folder of the results (default: results)"
    )
    options = parser.parse_args(arguments)
    if options.runs is not None:
        comparison = _compare(options.runs, options.time_scale)
    else:
        with tempfile.TemporaryDirectory() as runs:
            comparison = _compare(Path(runs), options.time_scale)
    options.out.mkdir(parents=True, exist_ok=True)
    scale = f"{options.time_scale:g}"
    results = options.out / f"comparison-{scale}.json"
    results.write_text(json.dumps(comparison, indent=1) + "\n", encoding="utf-8")
    _write_table(options.out / f"errors-{scale}.csv", comparison)
    differences = comparison["overall"]["differences"]
    missed = [name for name in ("mean", "p95") if abs(differences[name]["error"]) > _BAR_PERCENT]
    missed += [
        f"deployment {deployment['real']['deployment_id']}"
        if "deployment_id" in (deployment["real"] or {})
        else "a deployment"
        for deployment in comparison["deployments"]
        if not (deployment["same_configuration"] and deployment["same_gpus"])
    ]
    verdict = f"missed: {', '.join(missed)}" if missed else "met"
    sys.stdout.write(
        f"mean {differences['mean']['error']:+.1f} %, p95 {differences['p95']['error']:+.1f} %: bar {verdict}\n"
    )
    return bool(missed)


def _compare(runs: Path, time_scale: float) -> dict[str, Any]:
    """Return the comparison of both runs; run those whose folder does not exist."""
    simulated, real = runs / "simulated", runs / f"emulated-{time_scale:g}"
    common = (*_OPTIONS, "--profile", str(_profile(runs / "profile")))
    if not simulated.exists():
        _maveriq("sim", *common, "--quiet", "--out", str(simulated))
    if not real.exists():
        scaled = ("--backend", "emulated", "--time-scale", f"{time_scale:g}")
        _maveriq("run", *common, *scaled, "--quiet", "--out", str(real))
    compared: dict[str, Any] = json.loads(_maveriq("compare", str(simulated), str(real), "--json"))
    return {**compared, "sim": simulated.name, "real": real.name}


def _profile(folder: Path) -> Path:
    """Copy the default profile, set the load of all GPUs to be sampled at one instant, and return its path."""
    shutil.copytree(data_path("a6000"), folder, dirs_exist_ok=True)
    hardware = folder / "hardware.toml"
    in_step, found = re.subn(r"(?m)^max_phase_s = .*$", "max_phase_s = 0.0", hardware.read_text(encoding="utf-8"))
    if found != 1:
        raise ValueError(f"{hardware} sets max_phase_s {found} times, not once")
    hardware.write_text(in_step, encoding="utf-8")
    return folder / "profile-short.toml"


def _maveriq(*arguments: str) -> str:
    command = [sys.executable, "-m", "maveriq", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603


def _write_table(path: Path, comparison: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["figure", "simulated", "emulated", "error_percent"])
        for name, difference in comparison["overall"]["differences"].items():
            if difference["sim"] is not None and difference["real"] is not None and difference["error"] is not None:
                rows.writerow(
                    [name, f"{difference['sim']:.4f}", f"{difference['real']:.4f}", f"{difference['error']:.2f}"]
                )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
