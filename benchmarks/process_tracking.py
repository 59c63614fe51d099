"""Measure what tracking the processes of engines costs the executor while nothing happens.

Usage: python benchmarks/process_tracking.py [--engines 16] [--ranks 8] [--others 1000] [--seconds 20]

The script starts engines of idle processes and other idle processes, tracks the engines as the executor does, and
prints as JSON the CPU time that this process uses per second, in milliseconds: `serving` while all engines have loaded,
so that scans are a second apart, `starting` before that, and `without` before there are engines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import time

from maveriq.exec.process_tree import ProcessTree, ProcessTrees
from maveriq.exec.processes import ENGINE_ID, running_processes

_RANK = "sleep 600 & "


async def _cpu_ms_per_s(duration_s: float) -> float:
    """Return the CPU time of all threads of this process, in ms per second."""
    started_s, used_s = time.monotonic(), time.process_time()
    await asyncio.sleep(duration_s)
    return 1e3 * (time.process_time() - used_s) / (time.monotonic() - started_s)


def _start(script: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sh", "-c", script + "wait"], env=os.environ | environment, start_new_session=True)  # noqa: S607


async def _measure(engines: int, ranks: int, others: int, duration_s: float) -> dict[str, float]:
    trees = ProcessTrees()
    started = [_start(_RANK * others)]
    tracked: list[ProcessTree] = []
    without_ms = await _cpu_ms_per_s(duration_s)
    for number in range(engines):
        engine = _start(_RANK * ranks, **{ENGINE_ID: f"benchmark-{number}"})
        started.append(engine)
        tracked.append(trees.track(f"benchmark-{number}", engine.pid))
    while any(len(tree.pids) < ranks for tree in tracked):
        await asyncio.sleep(0.1)
    starting_ms = await _cpu_ms_per_s(duration_s)
    for tree in tracked:
        tree.engine_loaded()
    while not all(tree.is_settled for tree in tracked):
        await asyncio.sleep(0.1)
    serving_ms = await _cpu_ms_per_s(duration_s)
    processes = len(running_processes())
    for process, tree in zip(started[1:], tracked, strict=True):
        process.kill()
        process.wait()
        tree.leader_exited()
    await asyncio.gather(*(tree.gone for tree in tracked))
    trees.close()
    os.killpg(started[0].pid, 9)
    started[0].wait()
    return {
        "processes": processes,
        "without_ms_per_s": round(without_ms, 3),
        "starting_ms_per_s": round(starting_ms, 3),
        "serving_ms_per_s": round(serving_ms, 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="CPU time of tracking the processes of engines.")
    parser.add_argument("--engines", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=8, help="processes of each engine besides its leader")
    parser.add_argument("--others", type=int, default=1000, help="processes that belong to no engine")
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of each measurement")
    asked = parser.parse_args()
    print(json.dumps(asyncio.run(_measure(asked.engines, asked.ranks, asked.others, asked.seconds))))


if __name__ == "__main__":
    main()
