"""Measure three small models on this machine, run a workload on torch engines, and compare it with its simulation.

Usage: python experiments/torch_cpu/small_models.py [--work DIR] [--out DIR]

The results go to experiments/torch_cpu/results/. --work keeps the profile and the run folders, and reuses those that
exist. The exit code is 1 if the mean latency differs by more than 15 %, or if a deployment differs. The experiment
takes about ten minutes on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from maveriq.streams import generator

_HERE = Path(__file__).parent
_BAR_PERCENT = 15.0
_ENGINES = ("small-llama=2x1", "small-falcon=1x3", "small-gptj=1x1:int8")
_MODELS = [str(_HERE / "models" / engine.partition("=")[0]) for engine in _ENGINES]
_MEASURED_PROMPTS, _OUTPUT_TOKENS = "16,64,128,256", 24
_FIRST_S, _LAST_S, _REQUESTS = 210.0, 330.0, 90  # the third model is requested at 180 s


def main(arguments: list[str]) -> int:
    """Measure, simulate, run, compare, write, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="folder in which to keep the profile and the run folders"
    )
    parser.add_argument(
        "--out", type=Path, default=_HERE / "results", metavar="DIR", help="folder of the results (default: results)"
    )
    options = parser.parse_args(arguments)
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        comparison, profile = _compare(options.work)
    else:
        with tempfile.TemporaryDirectory() as work:
            comparison, profile = _compare(Path(work))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "comparison.json").write_text(json.dumps(comparison, indent=1) + "\n", encoding="utf-8")
    (options.out / "measured.csv").write_text(profile, encoding="utf-8")
    _write_table(options.out / "errors.csv", comparison)
    error = comparison["overall"]["differences"]["mean"]["error"]
    same = all(deployment["same_configuration"] and deployment["same_gpus"] for deployment in comparison["deployments"])
    met = abs(error) <= _BAR_PERCENT and same
    sys.stdout.write(
        f"mean latency {error:+.1f} %, deployments {'equal' if same else 'differ'}: bar {'met' if met else 'missed'}\n"
    )
    return not met


def _compare(work: Path) -> tuple[dict[str, Any], str]:
    """Return the comparison and the measurements; create the files that do not exist."""
    profile, schedule = work / "profile", work / "schedule.csv"
    if not profile.exists():
        configurations = [word for engine in _ENGINES for word in ("--configuration", engine)]
        _maveriq(
            "profile", *_MODELS, *configurations, "--prompt-tokens", _MEASURED_PROMPTS,
            "--output-tokens", str(_OUTPUT_TOKENS), "--out", str(profile),
        )  # fmt: skip
    if not schedule.exists():
        _write_schedule(schedule)
    scenario = [
        "--trace", str(schedule), "--models", str(_HERE / "set.toml"), "--gpus", "3xcpu",
        "--profile", str(profile / "profile.toml"), "--estimator", "measured", "--service-times", "measured",
        "--intent", "min-latency", "--quiet",
    ]  # fmt: skip
    simulated, real = work / "simulated", work / "torch"
    if not real.exists():
        _maveriq("run", "--backend", "torch", *scenario, "--out", str(real))
    _maveriq("sim", *scenario, "--out", str(simulated), "--overwrite")
    compared: dict[str, Any] = json.loads(_maveriq("compare", str(simulated), str(real), "--json"))
    return {**compared, "sim": simulated.name, "real": real.name}, (profile / "measured.csv").read_text()


def _write_schedule(path: Path) -> None:
    draw = generator(42, "torch on a CPU")
    times_s = sorted(draw.uniform(_FIRST_S, _LAST_S, _REQUESTS))
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["arrival_s", "endpoint", "prompt_tokens", "output_tokens"])
        for time_s in times_s:
            endpoint, prompt, output = draw.integers(1, 4), draw.integers(16, 257), draw.integers(8, 33)
            rows.writerow([f"{time_s:.6f}", endpoint, prompt, output])


def _maveriq(*arguments: str) -> str:
    command = [sys.executable, "-m", "maveriq", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603


def _write_table(path: Path, comparison: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["model", "figure", "simulated", "torch", "error_percent"])
        groups = {"all": comparison["overall"], **comparison["models"]}
        for model, group in groups.items():
            for name, difference in group["differences"].items():
                if None not in (difference["sim"], difference["real"], difference["error"]):
                    rows.writerow(
                        [
                            model,
                            name,
                            f"{difference['sim']:.4f}",
                            f"{difference['real']:.4f}",
                            f"{difference['error']:.2f}",
                        ]
                    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
