"""Measure what a plan costs once everything is loaded, beside the time of one evaluation of a step.

Usage: python benchmarks/plan.py [--gpus 16xH100-SXM] [--tries 5] [MODEL ...]

CPU times differ by half on a shared machine. So each plan is timed in turns with a thousand evaluations of a step in
Python, and their ratio says how many of these a configuration costs, whatever the machine. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

from maveriq.domain.gpu_kinds import gpu_sheet
from maveriq.domain.models import known_models, load_model
from maveriq.estimate.operators import operators_of
from maveriq.estimate.step_time import StepModel
from maveriq.planning import PlanOptions, rank_configurations

_STEPS = 1000
_MODELS = ("llama-3.1-8b", "qwen3-32b", "mixtral-8x7b", "gpt-oss-120b", "llama-3.1-405b", "deepseek-v3")


def main() -> None:
    """Print the figures of each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {len(known_models())} known by name; six by default")
    parser.add_argument("--gpus", default="16xH100-SXM", help="the cluster (default: %(default)s)")
    parser.add_argument("--tries", type=int, default=5, help="of which the least counts (default: %(default)s)")
    arguments = parser.parse_args()
    print(json.dumps([plan_figures(model, arguments.gpus, arguments.tries) for model in arguments.models or _MODELS]))


def plan_figures(model: str, gpus: str, tries: int) -> dict[str, object]:
    """Return the least CPU time of a warm plan, and how many evaluations of a step a configuration takes in it."""
    options = PlanOptions(gpus=gpus, engine="vllm", prompt_tokens=1024, output_tokens=256, batch_size=32)
    ranking = rank_configurations(model, options).ranking
    configurations = len(ranking.candidates) + len(ranking.rejected)
    steps = StepModel(load_model("llama-3.1-8b").decoder, operators_of(gpu_sheet("H100-SXM")))
    evaluate = partial(steps.gpu_us, decodes=64, context_tokens=64 * 1000)
    plan_s, step_s = [], []
    for _ in range(tries):
        plan_s.append(_cpu_s(partial(rank_configurations, model, options), 1))
        step_s.append(_cpu_s(evaluate, _STEPS) / _STEPS)
    return {
        "model": model,
        "gpus": gpus,
        "configurations": configurations,
        "plan_ms": round(1e3 * min(plan_s), 1),
        "steps_a_configuration": round(min(plan_s) / min(step_s) / configurations, 1),
    }


def _cpu_s(work: Callable[[], object], times: int) -> float:
    start = time.process_time()
    for _ in range(times):
        work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
