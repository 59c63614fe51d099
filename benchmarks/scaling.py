"""Measure simulations of large clusters with many models: placement decisions, the whole run, and memory.

Usage: python benchmarks/scaling.py [--gpus 64,512,4096] [--engines continuous|exclusive|mixed]... [--requests N]
           [--tries N] [--json] [--profile FILE]

A cluster of H100, eight to a node, serves up to 200 models, small and large in turn. Popularity falls with the square
root of the rank. The models load one after another while requests come, so that later decisions meet a cluster under
load. `continuous` models run on vLLM and leave configuration and replicas to the policy; `exclusive` ones serve one
request at a time, with as many replicas as their load needs; `mixed` has both in turn.

Each try is a process of its own: it reads the model set, builds the system, simulates it and writes the run folder. A
decision is timed as a whole: the loads of all GPUs, the cluster as the policy sees it, the policy, and the
reservation. The figures are those of the fastest try.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import math
import pstats
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
_GPUS_OF_MODELS = {64: 16, 512: 64, 4096: 200}
_MODELS = (
    "llama-3.1-8b", "qwen3-4b", "qwen3-14b", "mistral-7b", "qwen3-32b", "llama-3.2-3b", "qwen3-30b-a3b", "qwen2.5-7b",
    "llama-3.3-70b", "mistral-small-24b",
)  # fmt: skip
_RPS_PER_GPU = {"continuous": 9.0, "exclusive": 0.35}
_EXCLUSIVE_RPS_PER_REPLICA = 0.6
_FIRST_LOAD_BINS = 2  # of 30 s, over which the models load


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A cluster and what it serves: `engines` is continuous, exclusive or mixed."""

    gpus: int
    models: int
    engines: str
    requests: int

    def is_continuous(self, number: int) -> bool:
        """Return whether a model, from 0, runs on an engine that batches continuously."""
        return self.engines == "continuous" or (self.engines == "mixed" and number % 2 == 0)

    def rates_per_s(self) -> list[float]:
        """Return how many requests a second each model gets."""
        popularity = [1 / math.sqrt(1 + rank) for rank in range(self.models)]
        rates = [0.0] * self.models
        for kind, per_gpu in _RPS_PER_GPU.items():
            of_kind = [n for n in range(self.models) if self.is_continuous(n) == (kind == "continuous")]
            whole, gpus = sum(popularity[n] for n in of_kind), self.gpus * len(of_kind) / self.models
            for number in of_kind:
                rates[number] = per_gpu * gpus * popularity[number] / whole
        return rates

    def model_set(self) -> str:
        """Return the set as TOML."""
        rates = self.rates_per_s()
        lines = [f'name = "{self.models} models"']
        for number, rate in enumerate(rates):
            lines += ["[[models]]", f'model = "{_MODELS[number % len(_MODELS)]}"', f"expected_rps = {rate:.6f}"]
            lines.append(f"load_at = {_FIRST_LOAD_BINS * number // self.models}")
            if self.is_continuous(number):
                lines.append('slo_ttft_ms = 1000\n[models.engine]\nkind = "vllm"\nversion = "0.23.0"')
            else:
                lines.append(f"replicas = {math.ceil(rate / _EXCLUSIVE_RPS_PER_REPLICA)}")
        return "\n".join(lines) + "\n"


class TimedDecisions:
    """Times every decision of the deployment manager."""

    def __init__(self) -> None:
        from maveriq.control.deployment_manager import DeploymentManager

        self.seconds: list[float] = []
        self.replicas = 0
        decide = DeploymentManager.deploy

        def deploy(manager: DeploymentManager, *arguments: Any) -> Any:
            started_s = time.thread_time()
            deployments = decide(manager, *arguments)
            self.seconds.append(time.thread_time() - started_s)
            self.replicas += sum(deployment.plan is not None for deployment in deployments)
            return deployments

        DeploymentManager.deploy = deploy  # type: ignore[method-assign, assignment]


def one_try(case: Case) -> dict[str, Any]:
    """Simulate in this process, and return seconds by stage, counts and the peak of memory."""
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    stages: dict[str, float] = {"start": started_cpu_s}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        before_s = time.process_time()
        result = work()
        stages[name] = time.process_time() - before_s
        return result

    def imports() -> tuple[Any, ...]:
        from maveriq.runs import Run, save_run
        from maveriq.scenario.build import build_system
        from maveriq.scenario.options import Options
        from maveriq.sim import fast_forward  # noqa: F401  # numba, which simulations import when they need it
        from maveriq.sim.simulator import simulate

        return Run, save_run, build_system, Options, simulate

    run_type, save_run, build_system, options_type, simulate = timed("imports", imports)
    decisions = TimedDecisions()
    with tempfile.TemporaryDirectory() as scratch:
        models = Path(scratch) / "models.toml"
        models.write_text(case.model_set(), encoding="utf-8")
        options = options_type(
            models=str(models),
            gpus=f"{case.gpus}xH100-SXM",
            trace="synthetic",
            rate=sum(case.rates_per_s()),
            limit=case.requests,
            duration_s=10 * case.requests / sum(case.rates_per_s()),
            prompt_tokens="lognormal:500,0.8",
            output_tokens="lognormal:120,0.6",
            service_times="physics",
            load_s=10.0,
            drain_s=1e5,
        )
        system = timed("build", lambda: build_system(options))
        record = timed("simulate", lambda: simulate(system))
        run = run_type(record=record, meta={"notes": []}, options=options)
        timed("files", lambda: save_run(run, Path(scratch) / "run", overwrite=False))
    counts = run.summary.overall.counts
    ordered = sorted(decisions.seconds)
    used = {gpu for deployment in record.deployments if deployment.plan for gpu in deployment.plan.gpu_ids}
    return {
        "engines": case.engines,
        "gpus": case.gpus,
        "models": case.models,
        "replicas": decisions.replicas,
        "gpus_used": len(used),
        "requests": sum(record.requests.counts().values()),
        "completed": counts.completed,
        "decisions": len(ordered),
        "decision_median_ms": 1e3 * ordered[len(ordered) // 2],
        "decision_max_ms": 1e3 * ordered[-1],
        **{f"{name}_s": spent_s for name, spent_s in stages.items()},
        "cpu_s": time.process_time(),
        "wall_s": time.perf_counter() - started_s,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT / 1e6,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="64,512,4096", help="sizes of the cluster (default: %(default)s)")
    parser.add_argument("--models", type=int, help="models (default: 16, 64 and 200 for these sizes)")
    parser.add_argument("--engines", action="append", choices=("continuous", "exclusive", "mixed"), help="repeatable")
    parser.add_argument("--requests", type=int, default=1_000_000, help="of each run (default: %(default)s)")
    parser.add_argument("--tries", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each run")
    parser.add_argument("--profile", type=Path, help="profile one run in this process, and write it here")
    parser.add_argument("--one-try", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for engines in options.engines or ["continuous", "exclusive", "mixed"]:
        for gpus in map(int, options.gpus.split(",")):
            models = options.models or _GPUS_OF_MODELS.get(gpus, max(1, gpus // 8))
            case = Case(gpus=gpus, models=models, engines=engines, requests=options.requests)
            if options.profile:
                _profile(case, options.profile)
            elif options.one_try:
                print(json.dumps(one_try(case)))
            else:
                _report(case, options.tries, as_json=options.json)


def _profile(case: Case, path: Path) -> None:
    profile = cProfile.Profile()
    figures = profile.runcall(one_try, case)
    profile.dump_stats(path)
    print(json.dumps(figures))
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def _report(case: Case, tries: int, *, as_json: bool) -> None:
    command = [sys.executable, __file__, "--one-try", "--gpus", str(case.gpus), "--models", str(case.models)]
    command += ["--engines", case.engines, "--requests", str(case.requests)]
    found = [
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout) for _ in range(tries)
    ]
    best = min(found, key=lambda figures: float(figures["cpu_s"]))
    if as_json:
        print(json.dumps(best), flush=True)
        return
    for name, value in best.items():
        print(f"{name:20} {value if isinstance(value, str) else format(value, ',.4g' if value < 1e4 else ',.0f')}")
    print(flush=True)


if __name__ == "__main__":
    main()
