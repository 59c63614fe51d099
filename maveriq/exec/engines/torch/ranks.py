"""The processes of a model's ranks, as the engine sees them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

from maveriq.errors import MaveriqError
from maveriq.exec.engines.torch.wire import FROM_RANK, FromRank, LoadRank, RankFailed, Run, hear, say
from maveriq.exec.messages import EngineSpec, Generate

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_STOP_TIMEOUT_S = 10.0


class RankLostError(MaveriqError):
    """A rank's process is gone, or the ranks can no longer work together; the engine cannot go on."""


class Ranks:
    """One process per rank, children of this one and in its process group.

    They end when this process does, whatever way, since their sockets close.

    Args:
        spec: what they are to load.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._folder = TemporaryDirectory(prefix="maveriq-torch-")
        self._channels: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(len(spec.devices)):
                self._start(spec, rank)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids, in the order of ranks."""
        return tuple(process.pid for process in self._processes)

    def run(self, work: Generate) -> None:
        """Tell every rank to begin.

        Raises:
            RankLostError: one is gone.
        """
        for rank in range(len(self._processes)):
            self._say(rank, Run(work=work))

    def hear(self) -> tuple[int, FromRank]:
        """Wait for a message and return it with the rank that sent it.

        Raises:
            RankLostError: one is gone.
        """
        ready = wait(self._channels)
        return self._heard(next(rank for rank, channel in enumerate(self._channels) if channel in ready))

    def failures(self) -> list[RankFailed]:
        """Return what else failed, as far as ranks have said by now: where one fails, others miss it and fail too."""
        found = []
        for rank, channel in enumerate(self._channels):
            with suppress(RankLostError):
                while wait([channel], timeout=0):
                    _, message = self._heard(rank)
                    found += [message] if isinstance(message, RankFailed) else []
        return found

    def close(self) -> None:
        """End all of them at once: they hold nothing that is worth saving."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_TIMEOUT_S)
        for channel in self._channels:
            channel.close()
        self._folder.cleanup()

    def _start(self, spec: EngineSpec, rank: int) -> None:
        ours, theirs = socket.socketpair()
        self._channels.append(ours)
        with theirs:
            # -P: modules of the folder that this happens to run in are none of its business.
            command = [sys.executable, "-P", "-m", "maveriq.exec.engines.torch.rank", str(theirs.fileno())]
            process = subprocess.Popen(  # noqa: S603 - our own module
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=_environment(len(spec.devices))
            )
        self._processes.append(process)
        self._say(rank, LoadRank(spec=spec, rank=rank, meeting_point=str(Path(self._folder.name) / "ranks")))

    def _heard(self, rank: int) -> tuple[int, FromRank]:
        body = hear(self._channels[rank])
        if body is None:
            raise self._lost(rank)
        return rank, FROM_RANK.decode(body)

    def _say(self, rank: int, message: LoadRank | Run) -> None:
        try:
            say(self._channels[rank], message)
        except OSError:
            raise self._lost(rank) from None

    def _lost(self, rank: int) -> RankLostError:
        process = self._processes[rank]
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT_S)
        return RankLostError(f"the process of rank {rank} (pid {process.pid}) is gone: {_how(process.returncode)}")


def _how(code: int | None) -> str:
    if code is None:
        return "it closed its channel"
    if code == -signal.SIGKILL:
        return "killed, perhaps for want of memory"
    return f"ended by signal {-code}" if code < 0 else f"exit code {code}"


def _environment(ranks: int) -> dict[str, str]:
    """Return the environment of a rank: its share of the cores, nothing beyond this machine.

    Threads that wait must not spin: cores are shared with other ranks and engines (ten times slower where they do).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        **os.environ,
        "GLOO_SOCKET_IFNAME": _LOOPBACK,
        "NCCL_SOCKET_IFNAME": _LOOPBACK,
    }
