"""Run the code trace on emulated engines and compare that with its simulation.

Both sample the load of all GPUs at one instant: out of step, as on real GPUs, equally busy ones are told apart by
chance, and a millisecond decides where a deployment comes to lie.

Usage: python experiments/executor/emulated.py [--time-scale 0.2] [--runs DIR] [--out DIR]

With --runs the records are kept there, and runs that are there already are only compared. Exit code 1 says that mean
or p95 latency is off by more than 5 %, or that a deployment differs.
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
_WORLD = ("--estimator", "paper", "--service-times", "paper")


def main(arguments: list[str]) -> int:
    """Run, compare, write, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time-scale", type=float, default=0.2, help="real seconds per second of the run")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="where the records are kept")
    parser.add_argument("--out", type=Path, default=_RESULTS, metavar="DIR")
    said = parser.parse_args(arguments)
    if said.runs is not None:
        comparison = _compare(said.runs, said.time_scale)
    else:
        with tempfile.TemporaryDirectory() as runs:
            comparison = _compare(Path(runs), said.time_scale)
    said.out.mkdir(parents=True, exist_ok=True)
    scale = f"{said.time_scale:g}"
    whole = said.out / f"comparison-{scale}.json"
    whole.write_text(json.dumps(comparison, indent=1) + "\n", encoding="utf-8")
    _write_table(said.out / f"errors-{scale}.csv", comparison)
    differences = comparison["overall"]["differences"]
    missed = [name for name in ("mean", "p95") if abs(differences[name]["error"]) > _BAR_PERCENT]
    missed += [
        f"deployment {one['real']['deployment_id']}" if "deployment_id" in (one["real"] or {}) else "a deployment"
        for one in comparison["deployments"]
        if not (one["same_configuration"] and one["same_gpus"])
    ]
    verdict = f"missed: {', '.join(missed)}" if missed else "met"
    sys.stdout.write(
        f"mean {differences['mean']['error']:+.1f} %, p95 {differences['p95']['error']:+.1f} %: bar {verdict}\n"
    )
    return bool(missed)


def _compare(runs: Path, time_scale: float) -> dict[str, Any]:
    """Return the comparison of both runs, after running what is not there."""
    simulated, real = runs / "simulated", runs / f"emulated-{time_scale:g}"
    world = (*_WORLD, "--profile", str(_profile(runs / "profile")))
    if not simulated.exists():
        _maveriq("sim", *world, "--quiet", "--out", str(simulated))
    if not real.exists():
        scaled = ("--backend", "emulated", "--time-scale", f"{time_scale:g}")
        _maveriq("run", *world, *scaled, "--quiet", "--out", str(real))
    compared: dict[str, Any] = json.loads(_maveriq("compare", str(simulated), str(real), "--json"))
    return {**compared, "sim": simulated.name, "real": real.name}


def _profile(folder: Path) -> Path:
    """Return a copy of the usual profile in which the load of all GPUs is sampled at one instant."""
    shutil.copytree(data_path("a6000"), folder, dirs_exist_ok=True)
    hardware = folder / "hardware.toml"
    in_step, found = re.subn(r"(?m)^most_phase_s = .*$", "most_phase_s = 0.0", hardware.read_text(encoding="utf-8"))
    if found != 1:
        raise ValueError(f"{hardware} says {found} times, not once, how far samples may be out of step")
    hardware.write_text(in_step, encoding="utf-8")
    return folder / "profile-short.toml"


def _maveriq(*arguments: str) -> str:
    command = [sys.executable, "-m", "maveriq", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603


def _write_table(path: Path, comparison: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["figure", "simulated", "emulated", "error_percent"])
        for name, one in comparison["overall"]["differences"].items():
            if one["sim"] is not None and one["real"] is not None and one["error"] is not None:
                rows.writerow([name, f"{one['sim']:.4f}", f"{one['real']:.4f}", f"{one['error']:.2f}"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
