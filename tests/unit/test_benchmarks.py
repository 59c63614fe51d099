"""The benchmarks run; the tests do not check their figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("cluster", ["one", "four"])
def test_a_small_large_run(cluster: str) -> None:
    command = [sys.executable, str(BENCHMARKS / "large_run.py"), cluster, "500"]
    figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert set(figures) == {"simulate_us", "bare_events", "files_us", "memory_kib"}
    # Peak memory starts at that of the parent, the test process, so its growth can be 0.
    assert all(value > 0 for name, value in figures.items() if name != "memory_kib")


@pytest.mark.parametrize("options", [[], ["--step-by-step"], ["--engine", "sglang"]])
def test_engine_models_with_few_requests(options: list[str]) -> None:
    command = [sys.executable, str(BENCHMARKS / "engine.py"), "--requests", "40", *options]
    figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert figures["requests"] == 40
    assert figures["steps"] > 40


def test_the_executor_overhead_with_few_requests() -> None:
    command = [sys.executable, str(BENCHMARKS / "executor.py"), "--seconds", "0.2", "--engines", "2"]
    figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert figures["requests"] == 40
    assert 0 < figures["overhead_ms"]["p50"] <= figures["overhead_ms"]["p99"]


def test_a_plan_of_a_small_model() -> None:
    command = [sys.executable, str(BENCHMARKS / "plan.py"), "--tries", "1", "--gpus", "2xH100-SXM", "llama-3.1-8b"]
    (figures,) = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert figures["configurations"] > 10
    assert figures["plan_ms"] > 0 < figures["steps_a_configuration"]
