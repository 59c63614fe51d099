"""Measure the speed of the engine models alone: requests per CPU-second, with a constant step time.

Usage: python benchmarks/engine.py [--trace FILE.csv] [--engine ENGINE] [--step-by-step]

Without a trace, requests are like those of the Azure conversation trace of 2023: Poisson arrivals, prompts of about
1,000 tokens, outputs of about 200. They go to the engines in turn. The script prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from pathlib import Path

from maveriq.engine import EngineRequest
from maveriq.engine.interface import Engine
from maveriq.engine.reading import read_engine_settings
from maveriq.engine.settings import EngineHost
from maveriq.streams import generator
from maveriq.workload.trace_formats import read_requests

STEP_US = 8_000
KV_BLOCKS = 25_000


def synthetic(requests: int, rate_per_s: float) -> tuple[list[int], list[int], list[int]]:
    """Return arrival times in µs, prompt tokens and output tokens."""
    draws = generator(42, "engine benchmark")
    arrivals_us = (draws.exponential(1e6 / rate_per_s, requests)).cumsum().astype(int)
    prompts = draws.lognormal(6.5, 0.9, requests).clip(1, 8_000).astype(int)
    outputs = draws.lognormal(5.0, 0.8, requests).clip(1, 1_500).astype(int)
    return arrivals_us.tolist(), prompts.tolist(), outputs.tolist()


def recorded(path: Path) -> tuple[list[int], list[int], list[int]]:
    """Return the same of a trace."""
    trace = read_requests(path)
    return trace.arrival_us.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist()


def drive(engine: Engine, requests: list[EngineRequest], arrivals_us: list[int], *, skips: bool) -> tuple[int, int]:
    """Run an engine until all its requests have ended; return how many did, and its steps."""
    now_us = free_us = steps = finished = submitted = 0
    ends_us: deque[int] = deque()
    total = len(requests)
    while finished < total:
        while submitted < total and arrivals_us[submitted] <= now_us:
            engine.submit(requests[submitted])
            submitted += 1
        quiet = engine.quiet_run() if skips else None
        if quiet is not None:
            many = quiet.steps
            if submitted < total:
                many = min(many, -(-(arrivals_us[submitted] - now_us) // STEP_US))
            first, last = engine.advance(many)
            finished += sum(1 for token in first if token.finish_reason) + len(last)
            steps += many
            now_us += many * STEP_US
            free_us += many * STEP_US
            if ends_us:
                ends_us[0] += many * STEP_US
            continue
        while engine.next_step() is not None:
            free_us = max(free_us, now_us) + STEP_US
            ends_us.append(free_us)
        if not ends_us:
            now_us = arrivals_us[submitted]
            continue
        now_us = ends_us.popleft()
        steps += 1
        for token in engine.finish_step():
            if token.finish_reason:
                finished += 1
    return finished, steps


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--rate", type=float, default=5.4)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--engine", default="vllm", help="a kind, a kind and a version, or a command line of vLLM")
    parser.add_argument("--step-by-step", action="store_true", help="do not skip steps")
    options = parser.parse_args()
    columns = recorded(options.trace) if options.trace else synthetic(options.requests, options.rate)
    settings = read_engine_settings(options.engine).resolve(EngineHost(context_tokens=16_384))
    started_s = time.process_time()
    requests = steps = 0
    for index in range(options.engines):
        arrivals_us, prompts, outputs = (column[index :: options.engines] for column in columns)
        asked = [
            EngineRequest(request_id=number, prompt_tokens=prompt, output_tokens=output)
            for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
        ]
        done, taken = drive(settings.make_engine(KV_BLOCKS), asked, arrivals_us, skips=not options.step_by_step)
        requests += done
        steps += taken
    spent_s = time.process_time() - started_s
    print(
        json.dumps(
            {
                "requests": requests,
                "steps": steps,
                "cpu_s": round(spent_s, 3),
                "requests_per_cpu_s": round(requests / spent_s),
                "us_per_request": round(spent_s * 1e6 / requests, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
