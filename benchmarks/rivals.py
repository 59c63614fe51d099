"""Measure maveriq beside simulators that are installed here: the same trace, the same machine, in turns.

Usage: python benchmarks/rivals.py --trace FILE.csv --dynamo PYTHON [--limit N] [--tries N] [--json]

PYTHON is the interpreter of an environment with Dynamo: `python -m venv DIR`, then `DIR/bin/pip install --no-deps
ai-dynamo==1.3.1 ai-dynamo-runtime==1.3.1`. Both simulate two engines of vLLM with continuous batching, without a prefix
cache, and route in turn; Dynamo with its default times of steps and 24,576 blocks of 16 tokens. They model different
things (docs/rivals.md), so that ratios say how long a user waits, not which is better. The CPU time of whole processes
counts, and the least of some tries.

BLIS (Go), splitwise-sim and Vidur are not measured here: the first two are in no package registry, and Vidur's package
has no profiles of GPUs. docs/performance.md has figures of them measured elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from serving import model_set

_ENGINES = 2
_DYNAMO = """
import json, sys
from dynamo.mocker import MockEngineArgs
from dynamo.replay import run_trace_replay
settings = {"num_gpu_blocks": 24576, "block_size": 16, "enable_prefix_caching": False}
engine = MockEngineArgs.from_json(json.dumps(settings))
report = run_trace_replay(sys.argv[1], extra_engine_args=engine, num_workers=int(sys.argv[2]), trace_block_size=512)
print(json.dumps({"completed": report["completed_requests"]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, help="a file of requests that maveriq reads")
    parser.add_argument("--dynamo", type=Path, required=True, help="the interpreter of an environment with Dynamo")
    parser.add_argument("--limit", type=int, help="only the first so many requests")
    parser.add_argument("--tries", type=int, default=2, help="of each (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        commands = _commands(Path(scratch), arguments.trace, arguments.dynamo, arguments.limit)
        tries = [{name: _measure(command) for name, command in commands.items()} for _ in range(arguments.tries)]
        requests = sum(1 for _ in (Path(scratch) / "trace.jsonl").open())
    best_s = {name: min(each[name][0] for each in tries) for name in commands}
    peak_mb = {name: max(each[name][1] for each in tries) for name in commands}
    found = {
        name: {
            "requests": requests,
            "cpu_s": round(best_s[name], 2),
            "requests_per_cpu_s": round(requests / best_s[name]),
            "peak_mb": round(peak_mb[name]),
            "times_as_long_as_maveriq": round(best_s[name] / best_s["maveriq"], 1),
        }
        for name in commands
    }
    print(json.dumps(found, indent=None if arguments.json else 2))


def _commands(scratch: Path, trace: Path, dynamo: Path, limit: int | None) -> dict[str, list[str]]:
    """Return the commands that simulate the trace, which is converted for those that need it."""
    models, mooncake = scratch / "models.toml", scratch / "trace.jsonl"
    models.write_text(model_set(_ENGINES), encoding="utf-8")
    first = [] if limit is None else ["--limit", str(limit)]
    maveriq = [sys.executable, "-m", "maveriq"]
    subprocess.run([*maveriq, "trace", "convert", str(trace), str(mooncake), "--to", "mooncake", *first], check=True)
    simulate = [
        *maveriq, "sim", "--quiet", "--trace", str(trace), "--models", str(models), "--gpus", f"{_ENGINES}xH100-SXM",
        "--service-times", "physics", "--router", "round-robin", "--drain-s", "1000000", *first,
    ]  # fmt: skip
    return {
        "maveriq": [*simulate, "--overwrite", "--out", str(scratch / "run")],
        "Dynamo replay": [str(dynamo), "-c", _DYNAMO, str(mooncake), str(_ENGINES)],
    }


def _measure(command: Sequence[str]) -> tuple[float, float]:
    """Run a command; return its CPU seconds and its peak of memory in MB."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 1e6


if __name__ == "__main__":
    main()
