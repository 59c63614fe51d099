"""The processes of a model's ranks, as the engine sees them.

The engine as its host sees it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

from maveriq.errors import MaveriqError
from maveriq.exec.engines.engine import EngineError, FailureKind, Step
from maveriq.exec.engines.torch.config import check_split, read_decoder_config, refuse
from maveriq.exec.engines.torch.messages import (
    FROM_RANK,
    FromRank,
    LoadRank,
    RankFailed,
    RankLoaded,
    Run,
    Stepped,
    receive,
    send,
)
from maveriq.exec.messages import EngineSpec, Generate, Loaded

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

    def receive(self) -> tuple[int, FromRank]:
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
        body = receive(self._channels[rank])
        if body is None:
            raise self._lost(rank)
        return rank, FROM_RANK.decode(body)

    def _say(self, rank: int, message: LoadRank | Run) -> None:
        try:
            send(self._channels[rank], message)
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


BACKEND = "torch"


class TorchEngine:
    """Runs a model in one process per shard (the `Engine` protocol).

    Where a rank is lost `RankLostError` is raised instead of an `EngineError`: nothing can be run any more.
    """

    def __init__(self) -> None:
        self._ranks: Ranks | None = None
        self._vocabulary = 0
        self._done = True  # of the execution: whether its last step was heard

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the ranks, stage by stage."""
        return () if self._ranks is None else self._ranks.pids

    def load(self, spec: EngineSpec) -> Loaded:
        """Start the ranks and wait until each has loaded and warmed up its part.

        Raises:
            EngineError: the model or the split is not supported, does not fit, or a rank failed.
        """
        arch = read_decoder_config(spec.config_json)
        check_split(spec, arch)
        if find_spec("torch") is None:
            refuse("torch is not installed here: pip install 'maveriq[torch]'")
        self._vocabulary = arch.vocabulary
        try:
            self._ranks = Ranks(spec)
            loaded = _all_loaded(self._ranks)
        except (RankLostError, OSError) as error:
            self.close()
            raise EngineError(FailureKind.ERROR, f"its ranks could not start: {error}") from None
        except EngineError:
            self.close()
            raise
        return Loaded(
            backend=BACKEND,
            version=metadata.version("torch"),
            weights_bytes=sum(rank.weights_bytes for rank in loaded),
            kv_cache_bytes=sum(rank.kv_cache_bytes for rank in loaded),
        )

    def generate(self, work: Generate) -> Iterator[Step]:
        """Yield each step as the last stage reports it.

        Raises:
            EngineError: a token is not in the vocabulary, or there is not memory enough.
            RankLostError: a rank is gone, or they failed in the midst of working together.
        """
        if self._ranks is None:
            raise RankLostError("the engine is not loaded")
        beyond = max(max(sequence.prompt) for sequence in work.sequences)
        if beyond >= self._vocabulary:
            message = f"token {beyond} is not in the vocabulary of {self._vocabulary}"
            raise EngineError(FailureKind.ERROR, message)
        ranks = self._ranks
        with suppress(EngineError):
            # Where nobody listened to the end of the execution before: the ranks know no other end.
            while not self._done:
                self._next_step(ranks)
        ranks.run(work)
        self._done = False
        while not self._done:
            yield self._next_step(ranks)

    def close(self) -> None:
        """Kill the ranks and wait until they are gone."""
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            ranks.close()

    def _next_step(self, ranks: Ranks) -> Step:
        """Wait for a step and note whether it is the execution's last; after a failure there is none either way."""
        self._done = True
        while True:
            rank, message = ranks.receive()
            if isinstance(message, RankFailed):
                raise _refused(ranks, message) if message.serves else RankLostError(f"rank {rank}: {message.message}")
            if isinstance(message, Stepped):
                self._done = message.last
                return message.tokens


def _all_loaded(ranks: Ranks) -> list[RankLoaded]:
    loaded: dict[int, RankLoaded] = {}
    while len(loaded) < len(ranks.pids):
        rank, message = ranks.receive()
        if isinstance(message, RankFailed):
            raise _cause([message, *ranks.failures()])
        if isinstance(message, RankLoaded):
            loaded[rank] = message
    return list(loaded.values())


def _refused(ranks: Ranks, first: RankFailed) -> EngineError:
    """Return why an execution cannot be, when all ranks have said so."""
    failures = [first]
    while len(failures) < len(ranks.pids):
        _, message = ranks.receive()
        if isinstance(message, RankFailed):
            failures.append(message)
    return _cause(failures)


def _cause(failures: list[RankFailed]) -> EngineError:
    """Return the failure that tells why: a plain error may be only that another rank is missed."""
    cause = next((failure for failure in failures if failure.kind != FailureKind.ERROR), failures[0])
    return EngineError(FailureKind(cause.kind), cause.message)
