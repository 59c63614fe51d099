"""Measure steps of language models, and single operators, on one GPU, for validation of step-time models.

Usage: python experiments/h100/measure.py --out DIR [--smoke | --operators] [--budget-s 440]

Each model runs in a process of its own, and every measurement is on disk at once: whatever ends early, the rest stays.
`--smoke` measures a point of each kind in about a minute. `--device cpu --tiny` runs the same code on small shapes.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_GRACE_S = 15.0
_LENGTHS, _BATCH_SIZES = (128, 512, 1024, 2048, 4096), (1, 4, 16, 64)
_TINY_LENGTHS, _TINY_BATCH_SIZES = (8, 16), (1, 2)
_MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "qwen3-14b": {
        "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "tie_word_embeddings": False,
    },
    "mixtral-8-layers": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": None, "tie_word_embeddings": False,
    },
    "falcon-7b": {
        "model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
        "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "bias": False, "alibi": False,
        "vocab_size": 65024, "max_position_embeddings": 4096, "tie_word_embeddings": True,
    },
}  # fmt: skip
_TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 256, "num_hidden_layers": 3,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One process of the run. Its share of the time left is its weight over those of all stages left."""

    name: str
    weight: float


_OPERATORS = "operators"
_STAGES = (
    Stage(name="llama-3.1-8b:bf16", weight=85),  # it imports meanwhile
    Stage(name=_OPERATORS, weight=90),
    Stage(name="falcon-7b:bf16", weight=55),
    Stage(name="mixtral-8-layers:bf16", weight=50),
    Stage(name="qwen3-14b:bf16", weight=75),
    Stage(name="llama-3.1-8b:int8", weight=50),
    Stage(name="falcon-7b:int8", weight=45),
)


def main(arguments: list[str]) -> int:
    """Run all stages, or the one that `--stage` names, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the records")
    parser.add_argument("--budget-s", type=float, default=440.0, help="seconds for all (default: 440)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="what to compute on (default: cuda)")
    parser.add_argument("--smoke", action="store_true", help="one point of each kind")
    parser.add_argument("--operators", action="store_true", help="single operators only")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage:
        return _run_stage(options)
    stages = [stage for stage in _STAGES if stage.name == _OPERATORS or not options.operators]
    return _run_all(stages, options)


def _run_all(stages: list[Stage], options: argparse.Namespace) -> int:
    arguments = [argument for argument in sys.argv[1:] if argument != str(options.out)]  # records name no folder
    environment: dict[str, Any] = {"arguments": arguments, "started_unix_s": options.started, "gpu": [_gpu_state()]}
    end = time.monotonic() + options.budget_s
    failures = 0
    with (options.out / "log.txt").open("a", encoding="utf-8") as log:
        waiting = _start(stages[0], options, log)
        for index, stage in enumerate(stages):
            process = waiting
            left_s = end - time.monotonic()
            budget_s = left_s * stage.weight / sum(later.weight for later in stages[index:])
            _say(f"{stage.name}: {budget_s:.0f} s of {left_s:.0f} s left")
            code = _let_run(process, budget_s)
            if index + 1 < len(stages):
                waiting = _start(stages[index + 1], options, log)  # imports while this stage measures
            code = code if code is not None else _wait(process, budget_s + _GRACE_S)
            failures += code != 0
            environment["gpu"].append({"after": stage.name, "exit_code": code, **_gpu_state()})
            (options.out / "environment.json").write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")
    _say(f"{len(stages) - failures} of {len(stages)} stages ended well, {end - time.monotonic():.0f} s are left")
    for path in sorted(options.out.glob("*.csv")):
        _say(_summary(path))
    if failures:
        _say((options.out / "log.txt").read_text(encoding="utf-8")[-4000:])
    return min(failures, 1)


def _start(stage: Stage, options: argparse.Namespace, log: Any) -> subprocess.Popen[str]:
    """Start a stage. It imports, and waits for its deadline on standard input before it touches the device."""
    command = [sys.executable, __file__, "--stage", stage.name, "--out", str(options.out), "--device", options.device]
    command += ["--started", str(options.started)]
    command += ["--smoke"] * options.smoke + ["--tiny"] * options.tiny
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True)  # noqa: S603


def _let_run(process: subprocess.Popen[str], budget_s: float) -> int | None:
    """Send a stage its deadline. Returns its exit code if it has already died."""
    try:
        assert process.stdin is not None  # noqa: S101 (for the type checker: it was asked for)
        process.stdin.write(f"{time.time() + budget_s}\n")
        process.stdin.flush()
    except BrokenPipeError:
        return process.wait()
    return None


def _wait(process: subprocess.Popen[str], limit_s: float) -> int:
    try:
        return process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        _say("stopped: it ran past its budget")
        return process.wait()


def _run_stage(options: argparse.Namespace) -> int:
    import torch
    from model_steps import Grid, ModelStage
    from operators import OperatorStage

    gc.collect()
    gc.freeze()  # a capture collects garbage: without the libraries' objects that takes no time
    deadline = float(sys.stdin.readline())
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    if options.tiny:
        torch.set_num_threads(1)  # more of them only wait for each other
    _write_versions(options.out / "versions.json", device)
    if options.stage == _OPERATORS:
        OperatorStage(
            device=device, out=options.out, started=options.started, smoke=options.smoke, tiny=options.tiny
        ).run(deadline)
        return 0
    name, _, weights = options.stage.partition(":")
    settings = {**_MODELS[name], **_tiny_settings(name)} if options.tiny else _MODELS[name]
    full_layers = settings["num_hidden_layers"]
    lengths, sizes = (_TINY_LENGTHS, _TINY_BATCH_SIZES) if options.tiny else (_LENGTHS, _BATCH_SIZES)
    is_short = options.smoke and options.stage != _STAGES[0].name
    ModelStage(
        name=name,
        settings=settings,
        weights=weights,
        grid=Grid(lengths=lengths, batch_sizes=sizes),
        device=device,
        out=options.out,
        started=options.started,
        layers=(2,) if is_short else (1, 2, full_layers),
        smoke=options.smoke,
    ).run(deadline)
    return 0


def _tiny_settings(name: str) -> dict[str, Any]:
    return {key: value for key, value in _TINY.items() if key in _MODELS[name]}


def _write_versions(path: Path, device: Any) -> None:
    """Write what the records rest on, once."""
    import platform

    import torch
    import transformers

    if path.exists():
        return
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": list(torch.cuda.get_device_capability(device)),
            "cudnn": torch.backends.cudnn.version(),
        }
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _gpu_state() -> dict[str, str]:
    """Read name, driver, clocks, power and temperature of the GPU; nothing is set."""
    fields = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,clocks.sm,clocks.mem,power.limit"
    fields += ",power.draw,temperature.gpu,ecc.mode.current,clocks_event_reasons.active"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}
    values = [value.strip() for value in output.stdout.split(",")]
    return dict(zip(fields.split(","), values, strict=False))


def _summary(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    counts = ", ".join(
        f"{sum(f',{status},' in line for line in lines)} {status}" for status in ("measured", "skipped", "failed")
    )
    failed = [line for line in lines if ",failed," in line]
    return "\n".join([f"{path.name}: {len(lines) - 1} rows ({counts})", *failed[:10]])


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
