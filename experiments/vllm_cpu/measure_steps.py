"""Measure how long the steps of a vLLM on a CPU take; run by the Python of its environment (see three_loads.py).

It keeps 1, 2, 4, ... requests in flight in the engine that `maveriq run` runs, without an executor, and writes what
each step computed and how long it took.
"""

from __future__ import annotations

import argparse
import json
import random  # noqa: TID251  (runs in vLLM's environment)
import time
from pathlib import Path
from typing import Any

from maveriq.exec.continuous_loop import ContinuousLoop
from maveriq.exec.engines.continuous import StepOutput
from maveriq.exec.engines.vllm_batching import ContinuousVllmEngine
from maveriq.exec.messages import BatchingSpec, EngineSpec, PromptSequence

WARM_UP_STEPS = 30


class Observed(ContinuousVllmEngine):
    """vLLM, and what its last step computed: tokens and past tokens of each request."""

    def __init__(self) -> None:
        super().__init__()
        self.batch: list[tuple[int, int]] = []
        self._past: dict[str, int] = {}

    def _note(self, scheduled: Any, output: StepOutput) -> None:
        super()._note(scheduled, output)
        for name in scheduled.preempted_req_ids or ():
            self._past[name] = 0
        for new in scheduled.scheduled_new_reqs:
            self._past[new.req_id] = new.num_computed_tokens
        self.batch = []
        for name, tokens in scheduled.num_scheduled_tokens.items():
            past = self._past.get(name, 0)
            self.batch.append((tokens, past))
            self._past[name] = past + tokens


def measure(spec: EngineSpec, *, seconds: float, in_flight: list[int], seed: int) -> list[dict[str, Any]]:
    """Return a record for each step, the first few of each number in flight left out."""
    draws = random.Random(seed)  # noqa: S311
    engine = Observed()
    engine.load(spec)
    loop = ContinuousLoop(engine, lambda _report: None)
    records: list[dict[str, Any]] = []
    request_id = 0
    for most in in_flight:
        ends_s, steps = time.monotonic() + seconds / len(in_flight), 0
        while time.monotonic() < ends_s:
            while len(loop.open_requests) < most:
                request_id += 1
                prompt = tuple(draws.randrange(3, 4000) for _ in range(draws.randint(20, 300)))
                loop.submit(
                    PromptSequence(request_id=request_id, prompt=prompt, output_tokens=draws.randint(5, 80)),
                    is_urgent=False,
                )
            begun_s = time.perf_counter()
            loop.step()
            step_s = time.perf_counter() - begun_s
            steps += 1
            if steps > WARM_UP_STEPS and engine.batch:
                records.append({"step_s": step_s, "batch": engine.batch})
        for open_id in loop.open_requests:
            loop.abort(open_id)
    engine.close()
    return records


def main() -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--arguments", required=True, help="of the engine, as JSON")
    parser.add_argument("--in-flight", type=int, nargs="+", required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    config = json.loads(options.config.read_text("utf-8"))
    spec = EngineSpec(
        deployment_id=1, generation=1, model="tiny", config_json=json.dumps(config), tp=1, pp=1,
        layer_split=(config["num_hidden_layers"],), weights="float16", kv="native", batch_size=1, devices=("cpu",),
        batching=BatchingSpec(kind="vllm", arguments=json.loads(options.arguments)),
    )  # fmt: skip
    records = measure(spec, seconds=options.seconds, in_flight=options.in_flight, seed=options.seed)
    options.out.write_text(json.dumps(records), "utf-8")


if __name__ == "__main__":
    main()
