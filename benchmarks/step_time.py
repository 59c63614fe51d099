"""Measure what step times cost: one step in Python and in compiled code, a run of steps, a model.

Usage: python benchmarks/step_time.py [MODEL [GPU]]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import numba
import numpy as np

from maveriq.domain.gpu_kinds import gpu_sheet
from maveriq.domain.models import load_model
from maveriq.estimate.compiled_step import decode_run_us, step_us
from maveriq.estimate.log_grid import Array
from maveriq.estimate.operators import operators_of
from maveriq.estimate.step_time import Chunk, Sharding, StepModel

_STEPS = 1_000_000
_RUNS = 100_000
_compiled: Callable[[Callable[..., float]], Callable[..., float]] = numba.njit


@_compiled
def _steps(packed: Array, steps: int, chunk_tokens: Array, chunk_past: Array, chunks: int) -> float:
    total_us = 0.0
    for step in range(steps):
        decodes = 1.0 + step % 200
        total_us += step_us(packed, decodes, decodes * (100.0 + step % 3000), chunk_tokens, chunk_past, chunks)
    return total_us


@_compiled
def _runs(packed: Array, runs: int, length: int) -> float:
    total_us = 0.0
    for run in range(runs):
        decodes = 1.0 + run % 200
        total_us += decode_run_us(packed, decodes, decodes * (100.0 + run % 3000), length)
    return total_us


def main(model_name: str, gpu_name: str) -> None:
    """Print the times."""
    decoder, operators = load_model(model_name).decoder, operators_of(gpu_sheet(gpu_name))
    sharding = Sharding(tp=4)
    print(f"{model_name} on {gpu_name}, TP 4; CPU time")
    _print("model of a step", _seconds(partial(StepModel, decoder, operators, sharding=sharding), 20))
    model = StepModel(decoder, operators, sharding=sharding)
    chunks = [Chunk(tokens=500, past=100), Chunk(tokens=12, past=3000)]
    alone = partial(model.gpu_us, decodes=64, context_tokens=64 * 1000)
    _print("step of 64 decodes, Python", _seconds(alone, 10_000))
    _print("the same with two chunks, Python", _seconds(partial(alone, chunks=chunks), 10_000))
    sizes = np.asarray([500.0, 12.0]), np.asarray([100.0, 3000.0])
    for count in (0, 2):
        _steps(model.packed, 1, *sizes, count)  # compiles
        seconds = _seconds(partial(_steps, model.packed, _STEPS, *sizes, count), 1) / _STEPS
        _print(f"step with {count} chunks, compiled", seconds)
    for length in (10, 1000):
        _runs(model.packed, 1, length)
        _print(f"run of {length} steps, compiled", _seconds(partial(_runs, model.packed, _RUNS, length), 1) / _RUNS)


def _seconds(work: Callable[[], object], times: int) -> float:
    """Return the seconds of CPU that some work takes: the best of five rounds of so many times."""
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        for _ in range(times):
            work()
        best = min(best, (time.process_time() - start) / times)
    return best


def _print(what: str, seconds: float) -> None:
    print(f"{what:34} {1e6 * seconds:10.3f} µs")


if __name__ == "__main__":
    main(*(sys.argv[1:] + ["llama-2-70b", "H100-SXM"][len(sys.argv) - 1 :]))
