"""Measure simulations of continuous engines, from the trace to the records: requests per CPU-second, and memory.

Usage: python benchmarks/serving.py [--trace FILE.csv | --requests N] [--engines N] [--python] [--tries N] [--json]

Each try is a process of its own, which builds the system, simulates it and writes the run folder. The best try counts.
Engines run in compiled code, and in Python with --python; the machine code must have been made by a run before.
Without a trace, requests are like those of the Azure conversation trace of 2023, at 2.7 a second for each engine.
Beside the figures stand those of other simulators on that trace, measured by us on a machine with two cores
(docs/performance.md).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from large_run import SimpyTimer

from maveriq.scenario import clocked_engine

OTHERS_PER_CPU_S = {"BLIS, tuned": 2_505, "splitwise-sim": 646, "Dynamo replay": 343, "Vidur": 130, "BLIS, default": 79}
_RATE_PER_ENGINE = 2.7
_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB


def model_set(engines: int) -> str:
    """Return a model set of Llama 3.1 8B on so many H100."""
    return (
        f'name = "bench"\n[[models]]\nmodel = "llama-3.1-8b"\ntp = 1\nreplicas = {engines}\n'
        '[models.engine]\nkind = "vllm"\nversion = "0.23.0"\n'
    )


def synthetic_trace(requests: int, rate_per_s: float) -> str:
    """Return a plain trace with Poisson arrivals and lengths about as in the Azure conversation trace."""
    from maveriq.streams import generator

    draws = generator(42, "serving benchmark")
    arrivals_s = draws.exponential(1 / rate_per_s, requests).cumsum().tolist()
    prompts = draws.lognormal(6.5, 0.9, requests).clip(1, 8_000).astype(int).tolist()
    outputs = draws.lognormal(5.0, 0.8, requests).clip(1, 1_500).astype(int).tolist()
    rows = (f"{at:.6f},{prompt},{output}\n" for at, prompt, output in zip(arrivals_s, prompts, outputs, strict=True))
    return "arrival_s,prompt_tokens,output_tokens\n" + "".join(rows)


def one_try(trace: Path, engines: int, *, in_python: bool) -> dict[str, float]:
    """Simulate in this process, and return CPU seconds by stage, counts and the peak of memory."""
    if in_python:
        clocked_engine.MIN_REQUESTS = sys.maxsize
    stages: dict[str, float] = {"start": time.process_time()}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started_s = time.process_time()
        result = work()
        stages[name] = time.process_time() - started_s
        return result

    def imports() -> tuple[Any, ...]:
        from maveriq.api import simulate
        from maveriq.cli.app import app
        from maveriq.runs import save_run
        from maveriq.scenario.build import build_system
        from maveriq.scenario.options import Options
        from maveriq.sim.simulator import simulate as simulate_system

        if not in_python:
            from maveriq.sim import fast_forward  # noqa: F401  # numba, which simulations import when they need it

        return simulate, app, save_run, build_system, Options, simulate_system

    *_, save_run, build_system, options_type, simulate_system = timed("imports", imports)
    from maveriq.runs import Run

    with tempfile.TemporaryDirectory() as scratch:
        models = Path(scratch) / "bench.toml"
        models.write_text(model_set(engines), encoding="utf-8")
        options = options_type(
            models=str(models), gpus=f"{engines}xH100-SXM", trace=str(trace), service_times="physics", drain_s=1e6
        )
        system = timed("build", lambda: build_system(options))
        simpy_timer = SimpyTimer()
        simpy_timer.wants_update()  # compiled code asks seldom
        before_s = simpy_timer.spent_s
        record = timed("simulate", lambda: simulate_system(system, simpy_timer))
        stages["simulate"] -= simpy_timer.spent_s - before_s
        simpy_timer.wants_update()
        run = Run(record=record, meta={"notes": []}, options=options)
        timed("files", lambda: save_run(run, Path(scratch) / "run", overwrite=False))
    counts = run.summary.overall.counts
    return {
        **stages,
        "bare_event_us": 1e6 * simpy_timer.spent_s / simpy_timer.events,
        "requests": counts.completed,
        "refused": counts.refused,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT / 1e6,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="a file of requests")
    parser.add_argument("--requests", type=int, default=20_000, help="of a synthetic trace (default: %(default)s)")
    parser.add_argument("--engines", type=int, default=2, help="GPUs with an engine each (default: %(default)s)")
    parser.add_argument("--python", action="store_true", help="run engines in Python, not in compiled code")
    parser.add_argument("--tries", type=int, default=3, help="processes (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--one-try", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_try:
        print(json.dumps(one_try(options.trace, options.engines, in_python=options.python)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        trace = options.trace
        if trace is None:
            trace = Path(scratch) / "synthetic.csv"
            rate_per_s = _RATE_PER_ENGINE * options.engines
            trace.write_text(synthetic_trace(options.requests, rate_per_s), encoding="utf-8")
        command = [sys.executable, __file__, "--one-try", "--trace", str(trace), "--engines", str(options.engines)]
        command += ["--python"] if options.python else []
        tries = [
            json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            for _ in range(options.tries)
        ]
    figures = summary(tries)
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:40} {value:,g}")
    for name, per_s in OTHERS_PER_CPU_S.items():
        print(f"times {name:34} {figures['requests_per_cpu_s'] / per_s:,.1f}")


def summary(tries: list[dict[str, float]]) -> dict[str, float]:
    """Return the best figures of some tries."""
    stages = {name: min(each[name] for each in tries) for name in ("start", "imports", "build", "simulate", "files")}
    requests = int(tries[0]["requests"])
    work_s = sum(stages[name] for name in ("build", "simulate", "files"))
    return {
        "requests": requests,
        "refused": int(tries[0]["refused"]),
        **{
            f"{name}_us_per_request": round(1e6 * stages[name] / requests, 2) for name in ("build", "simulate", "files")
        },
        "simulate_in_events_of_simpy_alone": round(
            min(1e6 * each["simulate"] / requests / each["bare_event_us"] for each in tries), 1
        ),
        "start_and_imports_s": round(stages["start"] + stages["imports"], 3),
        "cpu_s": round(work_s, 3),
        "requests_per_cpu_s": round(requests / work_s),
        "requests_per_cpu_s_with_start": round(requests / (work_s + stages["start"] + stages["imports"])),
        "peak_mb": round(max(each["peak_mb"] for each in tries), 1),
    }


if __name__ == "__main__":
    main()
