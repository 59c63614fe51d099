"""Profile, simulate and run a vLLM on a CPU: how near is the simulated mean latency at three loads?

`python experiments/vllm_cpu/three_loads.py --vllm-python PYTHON` takes about ten minutes on an idle machine. PYTHON is
that of an environment with vLLM for CPUs (docs/engines.md). Three parts:

1. `measure_steps.py` times steps of the engine with 1, 2, 4, ... requests in flight. The time of a step is fitted as a
   sum of terms in the sequences that decode, the tokens that they attend to, and the chunks of prompts. No run is used.
2. The fit says at which rate the engine is saturated. The loads are a quarter, a half and three quarters of that.
3. Each load is run with `maveriq.run(backend="vllm")`, and simulated with the fitted step times, in whose place the
   physics of a GPU stand otherwise.

It writes `results/loads.csv` and `results/steps.json`. vLLM computes on one core, so that the executor has another.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from scipy.optimize import nnls

import maveriq
from maveriq.domain.deployments import EndpointSpec
from maveriq.domain.parallel import DeploymentPlan
from maveriq.estimate.engine_presets import engine_preset
from maveriq.estimate.step_timer import StepTimer
from maveriq.exec.batching_spec import batching_specs
from maveriq.scenario.build import build_system
from maveriq.scenario.continuous_engines import ContinuousEngines, EngineParts
from maveriq.scenario.options import Options
from maveriq.sim.simulator import simulate

HERE = Path(__file__).parent
SHARES = (0.25, 0.5, 0.75)
"""Loads, as shares of the rate at which the engine is saturated."""

MEAN_PROMPT, MEAN_OUTPUT = 160, 42  # of the workload below
WORKLOAD: dict[str, Any] = {"prompt_tokens": "uniform:20-300", "output_tokens": "uniform:5-80", "arrivals": "poisson"}
TERMS = ("step", "decode", "context token", "chunk", "chunk token", "chunk token x token before")


def terms(decodes: float, context_tokens: float, chunks: Sequence[tuple[int, int]]) -> list[float]:
    """Return what the time of a step is a weighted sum of."""
    return [
        1.0,
        decodes,
        context_tokens,
        len(chunks),
        sum(tokens for tokens, _ in chunks),
        sum(tokens * (past + tokens / 2) for tokens, past in chunks),
    ]


@dataclass(frozen=True)
class FittedSteps:
    """Stands for a `StepModel`: the weights of `terms`, in µs."""

    weights_us: tuple[float, ...]
    contexts = (1, 1 << 20)

    def gpu_us(self, *, decodes: int, context_tokens: int, chunks: Sequence[tuple[int, int]] = ()) -> float:
        """Return the time of a step."""
        return float(np.dot(self.weights_us, terms(decodes, context_tokens, chunks)))


def fit(records: Sequence[dict[str, Any]]) -> tuple[FittedSteps, float]:
    """Return step times fitted to records, and the median error of a step."""
    rows, times_us = [], []
    for record in records:
        decodes = [past + 1 for tokens, past in record["batch"] if tokens == 1]
        chunks = [(tokens, past) for tokens, past in record["batch"] if tokens > 1]
        rows.append(terms(len(decodes), sum(decodes), chunks))
        times_us.append(1e6 * record["step_s"])
    measured, matrix = np.asarray(times_us), np.asarray(rows)
    weights, _ = nnls(matrix / measured[:, None], np.ones(len(measured)))  # errors count relative to the time
    error = float(np.median(np.abs(matrix @ weights / measured - 1)))
    return FittedSteps(tuple(map(float, weights))), error


@dataclass(frozen=True)
class FittedEngines:
    """Makes the engines of a model set with fitted step times; for all else they are `ContinuousEngines`."""

    engines: ContinuousEngines
    steps: FittedSteps

    def parts(self, endpoint: EndpointSpec, plan: DeploymentPlan) -> EngineParts:
        """Return a new engine."""
        parts = self.engines.parts(endpoint, plan)
        preset = msgspec.structs.replace(
            engine_preset("vllm-0.23.0"), step_us=0.0, sequence_us=0.0, layer_us=0.0, kernel_factor=1.0,
            prefill_factor=1.0, asynchronous=False,
        )  # fmt: skip
        timer = StepTimer(self.steps, preset, layers=1)  # type: ignore[arg-type]
        return replace(parts, timer=timer, admission_delay_us=lambda *_: 0)


def saturation_rps(steps: FittedSteps, sequences: int) -> float:
    """Return the requests a second of an engine that always has its most sequences."""
    context = sequences * (MEAN_PROMPT + MEAN_OUTPUT / 2)
    decode_us = steps.gpu_us(decodes=sequences, context_tokens=round(context))
    prefill_us = steps.gpu_us(decodes=sequences, context_tokens=round(context), chunks=[(MEAN_PROMPT, 0)]) - decode_us
    return 1e6 / (MEAN_OUTPUT * decode_us / sequences + prefill_us)


def measured_steps(python: str, arguments: dict[str, Any], sequences: int, seconds: float) -> list[dict[str, Any]]:
    """Return the steps that `measure_steps.py` records."""
    in_flight = [number for number in (1, 2, 4, 8, 16, 32) if number <= sequences]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "steps.json"
        command = [
            python, str(HERE / "measure_steps.py"), str(out), "--config", str(HERE / "config.json"), "--arguments",
            json.dumps(arguments), "--seconds", str(seconds), "--in-flight", *map(str, in_flight),
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
        subprocess.run(  # noqa: S603
            command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        return list(json.loads(out.read_text("utf-8")))


def show(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Measure, fit, run, simulate, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("--profile-s", type=float, default=100.0, help="of the measurement of steps")
    parser.add_argument("--duration-s", type=float, default=90.0, help="of each run")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="on which vLLM computes")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    chosen = parser.parse_args()
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(chosen.core)
    base = Options(
        models=str(HERE / "set.toml"), gpus="1xH100-SXM", service_times="physics", trace="synthetic", rate=1.0
    )
    system = build_system(base)
    engines = system.engines
    if engines is None:
        sys.exit("set.toml has no engine")
    [endpoint] = system.workload.endpoints
    plan = DeploymentPlan(
        model=endpoint.model, configuration=engines_configuration(endpoint), gpu_ids=(0,), gpu_bytes=(1,),
        est_latency_s=1.0, est_memory_bytes=1,
    )  # fmt: skip
    arguments = dict(batching_specs(engines)(endpoint, plan).arguments)
    sequences = int(arguments["max_num_seqs"])
    steps, step_error = fit(measured_steps(chosen.vllm_python, arguments, sequences, chosen.profile_s))
    saturated = saturation_rps(steps, sequences)
    lines = [f"steps: median error {100 * step_error:.1f} %; saturated at {saturated:.2f} requests/s"]
    lines += [f"  {name}: {weight:.4g} µs" for name, weight in zip(TERMS, steps.weights_us, strict=True)]
    show("\n".join(lines))
    rows = [load(base, steps, saturated, share, chosen.vllm_python, chosen.duration_s) for share in SHARES]
    chosen.out.mkdir(parents=True, exist_ok=True)
    with (chosen.out / "loads.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    fitted = {"median_error": round(step_error, 4), "us": dict(zip(TERMS, steps.weights_us, strict=True))}
    (chosen.out / "steps.json").write_text(json.dumps(fitted, indent=2) + "\n", "utf-8")
    worst = max(abs(float(row["latency_error_percent"])) for row in rows)
    show(f"worst error of the mean latency: {worst:.1f} % (bar 10 %)")


def engines_configuration(endpoint: EndpointSpec) -> Any:
    """Return the configuration that the set names."""
    if endpoint.configuration is None:
        sys.exit("set.toml names no configuration")
    return endpoint.configuration


def load(
    base: Options, steps: FittedSteps, saturated: float, share: float, python: str, duration_s: float
) -> dict[str, str]:
    """Run and simulate one load, and return its row."""
    options = replace(base, rate=round(share * saturated, 4), duration_s=duration_s, **WORKLOAD)
    system = build_system(options)
    if system.engines is None:
        sys.exit("set.toml has no engine")
    simulated = simulate(replace(system, engines=FittedEngines(system.engines, steps)))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        ran = maveriq.run(options, backend="vllm", engine_python={"vllm": python}, out=Path(folder) / "run")
    both = [means(record) for record in (ran.record, simulated)]
    row = {"share_of_saturation": str(share), "rate_rps": f"{options.rate:.3f}", "requests": str(both[0][3])}
    for name, real, model in zip(("latency", "ttft", "tpot"), both[0], both[1], strict=False):
        row |= {f"{name}_ms": f"{1e3 * real:.2f}", f"{name}_error_percent": f"{100 * (model / real - 1):.1f}"}
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


if __name__ == "__main__":
    main()
