"""Measure the fast kernel: alone, beside SimPy, and as a whole command whose records are in Parquet.

Usage: python benchmarks/fast_kernel.py [--requests N] [--compared N] [--rate N] [--json]

CPU times count, since other processes may use the machine. `--compared` requests are simulated by both kernels in one
process, and their records must be equal; `--requests` are simulated by `maveriq sim`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Self, TypeVar

import numpy as np

from maveriq.domain.records import RequestTable
from maveriq.scenario.build import build_system
from maveriq.scenario.options import Options
from maveriq.scenario.system import ReplaySystem
from maveriq.sim import exclusive_kernel
from maveriq.sim.fast_replay import FastReplay, load_kernel
from maveriq.sim.simulator import simulate

T = TypeVar("T")
_DRAIN_S = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000_000, help="of the whole command (default: %(default)s)")
    parser.add_argument(
        "--compared", type=int, default=200_000, help="simulated by both kernels (default: %(default)s)"
    )
    parser.add_argument("--rate", type=float, default=10.0, help="requests a second (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    arguments = parser.parse_args()
    found = {**kernels(arguments.compared, arguments.rate), **command(arguments.requests, arguments.rate)}
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        print(f"{name}: {value:,.2f}")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, NumPy {np.__version__}")


def kernels(requests: int, rate: float) -> dict[str, float]:
    """Simulate the same requests with both kernels, and return their times."""
    _, loading_s = _timed(load_kernel)
    system = _system(requests, rate)
    count = len(system.workload.arrivals)
    with _TimedKernel() as kernel:
        fast, fast_s = _timed(lambda: FastReplay(system).run(None))
    slow, slow_s = _timed(lambda: simulate(_system(requests, rate)))
    assert _is_equal(fast.requests, slow.requests)
    assert (fast.gpu_samples, fast.deployments) == (slow.gpu_samples, slow.deployments)
    return {
        "compared requests, equal records": count,
        "load the machine code, s": loading_s,
        "requests per CPU-second in the kernel": count / kernel.spent_s,
        "requests per CPU-second, fast": count / fast_s,
        "requests per CPU-second, SimPy": count / slow_s,
        "fast over SimPy": slow_s / fast_s,
    }


def command(requests: int, rate: float) -> dict[str, float]:
    """Run `maveriq sim` with the fast kernel and Parquet, and return its times and its peak of memory."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        words = [
            "sim",
            *_words(requests, rate),
            "--kernel",
            "fast",
            "--records",
            "parquet",
            "--quiet",
            "--out",
            str(out),
        ]
        start_s = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "maveriq", *words])
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start_s
        if status:
            raise SystemExit("maveriq sim failed")
        counts = json.loads((out / "run.json").read_text())["summary"]["overall"]["counts"]
        size = (out / "requests.parquet").stat().st_size
    cpu_s = usage.ru_utime + usage.ru_stime
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "whole command, requests": counts["scheduled"],
        "whole command, completed": counts["completed"],
        "whole command, wall s": wall_s,
        "whole command, CPU s": cpu_s,
        "whole command, requests per CPU-second": counts["scheduled"] / cpu_s,
        "whole command, peak GiB": peak / 2**30,
        "Parquet, bytes a request": size / counts["scheduled"],
    }


class _TimedKernel:
    """Adds up the CPU time of compiled code."""

    def __init__(self) -> None:
        self.spent_s = 0.0
        self._replay = exclusive_kernel.replay

    def __enter__(self) -> Self:
        exclusive_kernel.replay = self._timed
        return self

    def __exit__(self, *_: object) -> None:
        exclusive_kernel.replay = self._replay

    def _timed(self, at: int) -> int:
        outcome, spent_s = _timed(lambda: self._replay(at))
        self.spent_s += spent_s
        return outcome


def _words(requests: int, rate: float) -> list[str]:
    duration_s = requests / rate
    return f"--trace poisson --rate {rate} --duration-s {duration_s} --drain-s {_DRAIN_S:.0f}".split()


def _system(requests: int, rate: float) -> ReplaySystem:
    return build_system(Options(trace="poisson", rate=rate, duration_s=requests / rate, drain_s=_DRAIN_S))


def _is_equal(one: RequestTable, other: RequestTable) -> bool:
    return all(np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    start_s = time.process_time()
    result = work()
    return result, time.process_time() - start_s


if __name__ == "__main__":
    main()
