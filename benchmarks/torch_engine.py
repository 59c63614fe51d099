"""Compare the torch engine's own decoder with transformers' modules, on the families that both of them run.

Usage: OMP_NUM_THREADS=1 python benchmarks/torch_engine.py [--hidden 512] [--layers 8] [--prompt 128] [--output 32]

For llama, falcon with several KV heads, and GPT-J, and for batches of 1 and 8, it prints as JSON lines the time to the
first token and per further token of each, the least of four rounds that alternate, in milliseconds of processor time
(with one thread on an idle machine: of time), and the memory of weights and KV cache in bytes. Two lines before say
what a rank's start costs: CPU seconds and peak memory of a process that imports the modules of one and of the other.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from statistics import median
from typing import Any

from maveriq.exec.engines.torch.collectives import SingleRank
from maveriq.exec.engines.torch.config import ModelConfig, read_decoder_config, read_transformers_config
from maveriq.exec.engines.torch.rank import RankWorker
from maveriq.exec.messages import EngineSpec, PromptSequence

_VOCABULARY = 1000
_ROUNDS = 4
_READERS: Mapping[str, Callable[[str], ModelConfig]] = {
    "own": read_decoder_config,
    "transformers": read_transformers_config,
}
_MODULES = {"own": "maveriq.exec.engines.torch.model", "transformers": "maveriq.exec.engines.torch.transformers_stage"}
_COST = (
    "import importlib, json, resource, sys; importlib.import_module(sys.argv[1]);"
    "used = resource.getrusage(resource.RUSAGE_SELF);"
    "print(json.dumps({'cpu_s': round(used.ru_utime + used.ru_stime, 2), 'peak_mib': used.ru_maxrss // 1024}))"
)


def _configs(hidden: int, layers: int) -> Mapping[str, Mapping[str, Any]]:
    common = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": 8, "vocab_size": _VOCABULARY}
    return {
        "llama": {**common, "model_type": "llama", "num_key_value_heads": 2, "intermediate_size": 4 * hidden},
        "falcon": {**common, "model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
        "gptj": {
            "model_type": "gptj", "n_layer": layers, "n_embd": hidden, "n_head": 8, "rotary_dim": min(16, hidden // 8),
            "n_positions": 2048, "vocab_size": _VOCABULARY, "tie_word_embeddings": False,
        },
    }  # fmt: skip


def _worker(kind: str, config: Mapping[str, Any], layers: int) -> RankWorker:
    text = json.dumps(config)
    spec = EngineSpec(
        deployment_id=1, generation=1, model="compared", config_json=text, tp=1, pp=1, layer_split=(layers,),
        weights="float16", kv="native", batch_size=1, devices=("cpu",),
    )  # fmt: skip
    return RankWorker(spec, 0, SingleRank(), config=_READERS[kind](text))


def _times_ms(worker: RankWorker, batch: int, prompt: int, output: int) -> tuple[float, float]:
    """Return the processor time to the first token and the median per further token."""
    prompts = tuple(
        PromptSequence(
            request_id=number,
            prompt=tuple((7 * i * i + number) % _VOCABULARY for i in range(prompt)),
            output_tokens=output,
        )
        for number in range(batch)
    )
    stamps = [time.process_time()] + [time.process_time() for _ in worker.run(prompts)]
    steps = [1e3 * (after - before) for before, after in pairwise(stamps)]
    return steps[0], median(steps[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 512), ("layers", 8), ("prompt", 128), ("output", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    for kind, module in _MODULES.items():
        cost = subprocess.run([sys.executable, "-c", _COST, module], check=True, capture_output=True, text=True).stdout
        print(json.dumps({"start": kind, **json.loads(cost)}), flush=True)
    for family, config in _configs(args.hidden, args.layers).items():
        workers = {kind: _worker(kind, config, args.layers) for kind in _READERS}
        for batch in (1, 8):
            rounds = [
                (kind, _times_ms(worker, batch, args.prompt, args.output))
                for _ in range(_ROUNDS)
                for kind, worker in workers.items()
            ]
            for kind, worker in workers.items():
                measured = [times for of, times in rounds if of == kind]
                ttft_ms, tpot_ms = (round(min(column), 2) for column in zip(*measured, strict=True))
                row = {"family": family, "batch": batch, "modules": kind, "ttft_ms": ttft_ms, "tpot_ms": tpot_ms}
                row |= {"weights_bytes": worker.stage.weights_bytes, "kv_cache_bytes": worker.stage.kv_cache_bytes}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
