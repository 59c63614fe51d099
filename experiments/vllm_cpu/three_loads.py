"""Profile, simulate and run a vLLM on a CPU: how near is the simulated mean latency at three loads?

`python experiments/vllm_cpu/three_loads.py --vllm-python PYTHON` takes about twelve minutes on an idle machine of two
cores. PYTHON is that of an environment with vLLM for CPUs (docs/engines.md). Three parts:

1. `maveriq profile` measures the steps of models with a few of the eight layers. No run is used.
2. The profile says at which rate the engine is saturated. The loads are a quarter, a half and three quarters of that.
3. Each load is simulated with the profile, and run on the engine with the same options.

vLLM computes on one core, so that the client, which is `maveriq run`, has another. `--part` does one part alone: it
finds the others in `--work`. Results are `results/loads.csv` and `results/profile.json`.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import maveriq
from maveriq.domain.parallel import ParallelConfig
from maveriq.engine.vllm_settings import VllmSettings
from maveriq.estimate.blended_steps import continuous_estimator
from maveriq.estimate.engine_presets import engine_preset
from maveriq.estimate.fitted_profile import load_any_profile
from maveriq.estimate.step_timer import StepTimer
from maveriq.scenario.options import Options
from maveriq.workload.model_sets import load_model_set

HERE = Path(__file__).parent
SHARES = (0.25, 0.5, 0.75)
"""Loads, as shares of the rate at which the engine is saturated."""

MEAN_PROMPT, MEAN_OUTPUT = 160, 42  # of the workload below
WORKLOAD: dict[str, Any] = {"prompt_tokens": "uniform:20-300", "output_tokens": "uniform:5-80", "arrivals": "poisson"}
ENGINE = "vllm-0.32.0"


def show(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def profile(python: str, folder: Path, repeats: int) -> None:
    """Measure, unless that was done."""
    if (folder / "profile.json").exists():
        return
    command = [
        sys.executable, "-m", "maveriq", "profile", str(HERE / "config.json"), "--backend", "vllm", "--engine-python",
        f"vllm={python}", "--most-repeats", str(repeats), "--out", str(folder),
    ]  # fmt: skip
    begun_s = time.monotonic()
    subprocess.run(command, check=True)  # noqa: S603
    show(f"profiled in {time.monotonic() - begun_s:.0f} s")


def saturation_rps(timer: StepTimer, sequences: int) -> float:
    """Return the requests a second of an engine that always has its most sequences."""
    context = round(sequences * (MEAN_PROMPT + MEAN_OUTPUT / 2))
    decode_us = timer.steps.gpu_us(decodes=sequences, context_tokens=context)
    prefill_us = timer.steps.gpu_us(decodes=sequences, context_tokens=context, chunks=[(MEAN_PROMPT, 0)]) - decode_us
    return 1e6 / (MEAN_OUTPUT * decode_us / sequences + prefill_us)


def load(options: Options, share: float, python: str, work: Path) -> dict[str, str]:
    """Simulate and run one load, and return its row."""
    simulated = maveriq.simulate(options)
    begun_s, busy_s = time.monotonic(), time.process_time()
    ran = maveriq.run(
        options, backend="vllm", engine_python={"vllm": python}, out=work / f"run-{share}", overwrite=True
    )
    client = (time.process_time() - busy_s) / (time.monotonic() - begun_s)
    both = [means(each.record) for each in (ran, simulated)]
    row = {"share_of_saturation": str(share), "rate_rps": f"{options.rate:.3f}", "requests": str(both[0][3])}
    for name, real, model in zip(("latency", "ttft", "tpot"), both[0], both[1], strict=False):
        row |= {f"{name}_ms": f"{1e3 * real:.2f}", f"{name}_error_percent": f"{100 * (model / real - 1):.1f}"}
    row["client_cpu_share"] = f"{client:.2f}"
    show("  ".join(f"{name} {value}" for name, value in row.items()))
    return row


def means(record: Any) -> tuple[float, float, float, int]:
    """Return the mean latency, time to first token and time per further token, in s, and the requests."""
    table = record.requests
    done = table.finish_us >= 0
    latency = (table.finish_us - table.arrival_us)[done].mean() / 1e6
    ttft = (table.first_token_us - table.arrival_us)[done].mean() / 1e6
    several = done & (table.output_tokens > 1)
    tpot = ((table.finish_us - table.first_token_us)[several] / (table.output_tokens[several] - 1)).mean() / 1e6
    return float(latency), float(ttft), float(tpot), int(done.sum())


def main() -> None:
    """Measure, simulate, run, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("--duration-s", type=float, default=90.0, help="of each run")
    parser.add_argument("--repeats", type=int, default=15, help="of each measurement of the profile, at most")
    parser.add_argument("--seed", type=int, default=42, help="of the loads")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="on which vLLM computes")
    parser.add_argument("--part", choices=["profile", *map(str, SHARES)], help="do this alone")
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    chosen = parser.parse_args()
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(chosen.core)
    folder = chosen.work / "profile"
    if chosen.part in (None, "profile"):
        profile(chosen.vllm_python, folder, chosen.repeats)
    measured, entry = load_any_profile(str(folder)), load_model_set(str(HERE / "set.toml")).entries[0]
    estimator = continuous_estimator(measured, engine_preset(ENGINE), node_gpus=1)
    timer = estimator.step_timer(entry.model, ParallelConfig(tp=1, pp=1, weights=entry.model.unconverted))
    if not isinstance(entry.engine, VllmSettings) or entry.engine.max_num_seqs is None:
        sys.exit("set.toml has no vLLM with max_num_seqs")
    saturated = saturation_rps(timer, entry.engine.max_num_seqs)
    show(f"admission {1e3 * measured.admission_s:.2f} ms; saturated at {saturated:.2f} requests/s")
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "profile.json").write_bytes((folder / "profile.json").read_bytes())
    base = Options(
        models=str(HERE / "set.toml"), gpus="1xcpu", profile=str(folder), trace="synthetic", seed=chosen.seed,
        duration_s=chosen.duration_s, rate=1.0, **WORKLOAD,
    )  # fmt: skip
    path, rows = chosen.out / "loads.csv", {}
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            rows = {row["share_of_saturation"]: row for row in csv.DictReader(file)}
    for share in SHARES:
        if chosen.part in (None, str(share)):
            options = replace(base, rate=round(share * saturated, 4))
            rows[str(share)] = load(options, share, chosen.vllm_python, chosen.work)
    if not rows:
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(next(iter(rows.values()))))
        writer.writeheader()
        writer.writerows(rows[share] for share in sorted(rows))
    worst = max(abs(float(row["latency_error_percent"])) for row in rows.values())
    show(f"worst error of the mean latency: {worst:.1f} % (bar 10 %)")


if __name__ == "__main__":
    main()
