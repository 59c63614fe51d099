"""Engines whose ranks are not the leader's children, as those of TensorRT-LLM. They need nothing but msgspec.

Each prints `started NAME=PID ...` to its log.
"""

from __future__ import annotations

import os
import subprocess
import sys

from maveriq.exec.engines.emulated import EmulatedEngine
from maveriq.exec.messages import EngineSpec, Loaded

RANKS = 2

# As MPI does it: a daemon in a session of its own, and ranks in sessions of theirs. The daemon's parent ends at once,
# so that nothing but the environment says whose it is. A rank starts a helper, which inherits its number.
_DAEMON = f"""
import os, subprocess, sys, time
if os.fork():
    os._exit(0)
os.setsid()
started = {{"daemon": os.getpid()}}
for rank in range({RANKS}):
    process = subprocess.Popen(
        ["sh", "-c", "sleep 600 & echo $!; wait; sleep 600"],
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={{**os.environ, "OMPI_COMM_WORLD_RANK": str(rank)}},
    )
    started[f"rank{{rank}}"] = process.pid
    started[f"helper{{rank}}"] = int(process.stdout.readline())
print(*(f"{{name}}={{pid}}" for name, pid in started.items()), flush=True)
os.close(1)
time.sleep(600)
"""


class DaemonRanks(EmulatedEngine):
    """A daemon starts the ranks."""

    def load(self, spec: EngineSpec) -> Loaded:
        daemon = subprocess.run([sys.executable, "-c", _DAEMON], stdout=subprocess.PIPE, text=True, check=True)
        report(daemon.stdout.strip())
        return super().load(spec)


class MpiRanks(EmulatedEngine):
    """Open MPI starts the ranks, by the pool that TensorRT-LLM uses."""

    def load(self, spec: EngineSpec) -> Loaded:
        from mpi4py.futures import MPIPoolExecutor

        # Once for the life of this process: MPI cannot be initialised twice.
        self.pool = MPIPoolExecutor(RANKS)
        self.pool.bootup(wait=True)
        ranks = set()
        while len(ranks) < RANKS:
            ranks |= set(self.pool.map(_rank_and_pid, range(4 * RANKS)))
        daemon = next(iter(ranks))[2]
        report(f"daemon={daemon} " + " ".join(f"rank{rank}={pid}" for rank, pid, _ in sorted(ranks)))
        return super().load(spec)

    def close(self) -> None:
        self.pool.shutdown()
        super().close()


class HiddenCrash(EmulatedEngine):
    """A child that nobody waits for has ended well before the ranks start."""

    def load(self, spec: EngineSpec) -> Loaded:
        self.ended = subprocess.Popen(["true"])
        return super().load(spec)


def _rank_and_pid(_: object) -> tuple[str, int, int]:
    return os.environ["OMPI_COMM_WORLD_RANK"], os.getpid(), os.getppid()


def report(started: str) -> None:
    os.write(2, f"started leader={os.getpid()} {started}\n".encode())
