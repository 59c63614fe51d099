"""The torch engine's leader: starts one process per rank, and turns their reports into the steps of an execution."""

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
from maveriq.exec.engines.interpreter import module_command
from maveriq.exec.engines.torch.config import (
    ModelConfig,
    TransformersConfig,
    check_split,
    raise_unsupported,
    read_model_config,
)
from maveriq.exec.engines.torch.messages import (
    FROM_RANK,
    FromRank,
    LoadRank,
    RankFailed,
    RankLoaded,
    RunExecution,
    Stepped,
    receive,
    send,
)
from maveriq.exec.messages import EngineSpec, Generate, Inspected, Loaded

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_STOP_TIMEOUT_S = 10.0


class RankLostError(MaveriqError):
    """A rank's process has exited, or the ranks are out of step. The engine cannot continue."""


class RankProcesses:
    """One process per rank: children of this process, in its process group.

    A rank exits when this process does, for whatever reason, because its socket closes.

    Args:
        spec: what the ranks load.
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
        """Process ids, in rank order."""
        return tuple(process.pid for process in self._processes)

    def run(self, batch: Generate) -> None:
        """Start an execution on every rank.

        Raises:
            RankLostError: a rank has exited.
        """
        for rank in range(len(self._processes)):
            self._send_to(rank, RunExecution(batch=batch))

    def receive(self) -> tuple[int, FromRank]:
        """Wait for a message and return it with the rank that sent it.

        Raises:
            RankLostError: a rank has exited.
        """
        ready = wait(self._channels)
        return self._receive_from(next(rank for rank, channel in enumerate(self._channels) if channel in ready))

    def pending_failures(self) -> list[RankFailed]:
        """Return the failures that have arrived by now. One rank's failure makes the others fail too."""
        found = []
        for rank, channel in enumerate(self._channels):
            with suppress(RankLostError):
                while wait([channel], timeout=0):
                    _, message = self._receive_from(rank)
                    found += [message] if isinstance(message, RankFailed) else []
        return found

    def close(self) -> None:
        """Kill all ranks; they hold no state worth saving."""
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
            command = [*module_command(sys.executable, "maveriq.exec.engines.torch.rank"), str(theirs.fileno())]
            process = subprocess.Popen(  # noqa: S603 - our own module
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=_environment(len(spec.devices))
            )
        self._processes.append(process)
        self._send_to(rank, LoadRank(spec=spec, rank=rank, rendezvous_file=str(Path(self._folder.name) / "ranks")))

    def _receive_from(self, rank: int) -> tuple[int, FromRank]:
        body = receive(self._channels[rank])
        if body is None:
            raise self._lost(rank)
        return rank, FROM_RANK.decode(body)

    def _send_to(self, rank: int, message: LoadRank | RunExecution) -> None:
        try:
            send(self._channels[rank], message)
        except OSError:
            raise self._lost(rank) from None

    def _lost(self, rank: int) -> RankLostError:
        process = self._processes[rank]
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT_S)
        return RankLostError(
            f"the process of rank {rank} (pid {process.pid}) is gone: {_describe_exit(process.returncode)}"
        )


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "it closed its channel"
    if code == -signal.SIGKILL:
        return "killed, perhaps out of memory"
    return f"ended by signal {-code}" if code < 0 else f"exit code {code}"


def _environment(ranks: int) -> dict[str, str]:
    """Return the environment of a rank: its share of the cores, communication over loopback only, and no downloads.

    Waiting threads must not spin, because ranks and engines share the cores (spinning is ten times slower).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TRANSFORMERS_VERBOSITY": "error",
        **os.environ,
        "HF_HUB_OFFLINE": "1",  # a model's files are local, whatever they name
        "GLOO_SOCKET_IFNAME": _LOOPBACK,
        "NCCL_SOCKET_IFNAME": _LOOPBACK,
    }


BACKEND = "torch"


class TorchEngine:
    """Runs a model in one process per shard (the `Engine` protocol).

    A lost rank raises `RankLostError` instead of `EngineError`: the engine can run nothing afterwards.
    """

    def __init__(self) -> None:
        self._ranks: RankProcesses | None = None
        self._vocabulary = 0
        self._positions: int | None = None  # of a model that has no more
        self._done = True  # whether the last step of the current execution has arrived

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the ranks, stage by stage."""
        return () if self._ranks is None else self._ranks.pids

    def inspect(self, spec: EngineSpec) -> Inspected:
        """Return the version of torch; its functions take no arguments that depend on a spec."""
        config = read_model_config(spec.config_json)
        check_split(spec, config)
        _check_installed(config)
        return Inspected(version=metadata.version("torch"))

    def load(self, spec: EngineSpec) -> Loaded:
        """Start the ranks and wait until each has loaded and warmed up its shard.

        Raises:
            EngineError: the model or the parallel configuration is not supported, does not fit, or a rank failed.
        """
        config = read_model_config(spec.config_json)
        check_split(spec, config)
        _check_installed(config)
        self._vocabulary = config.vocabulary
        self._positions = config.context_tokens if isinstance(config, TransformersConfig) else None
        try:
            self._ranks = RankProcesses(spec)
            loaded = _wait_until_loaded(self._ranks)
        except (RankLostError, OSError) as error:
            self.close()
            raise EngineError(FailureKind.ERROR, f"its ranks could not start: {error}") from None
        except EngineError:
            self.close()
            raise
        return Loaded(
            backend=BACKEND,
            version=metadata.version("torch"),
            weights_bytes=sum(rank.shard.weights_bytes for rank in loaded),
            kv_cache_bytes=sum(rank.kv_cache_bytes for rank in loaded),
            shards=tuple(rank.shard for rank in loaded),
        )

    def generate(self, batch: Generate) -> Iterator[Step]:
        """Yield each step as the last stage reports it.

        Raises:
            EngineError: a token is not in the vocabulary, a sequence has too many tokens, or memory is short.
            RankLostError: a rank has exited, or failed in the middle of an execution.
        """
        if self._ranks is None:
            raise RankLostError("the engine is not loaded")
        max_token = max(max(sequence.prompt) for sequence in batch.sequences)
        if max_token >= self._vocabulary:
            raise EngineError(FailureKind.ERROR, f"token {max_token} is not in the vocabulary of {self._vocabulary}")
        longest = max(len(sequence.prompt) + sequence.output_tokens for sequence in batch.sequences)
        if self._positions is not None and longest > self._positions:
            raise EngineError(
                FailureKind.ERROR,
                f"a sequence of {longest} tokens is longer than the model's {self._positions} positions",
            )
        ranks = self._ranks
        with suppress(EngineError):
            # The caller may have dropped the previous execution; the ranks still run it to its end.
            while not self._done:
                self._next_step(ranks)
        ranks.run(batch)
        self._done = False
        while not self._done:
            yield self._next_step(ranks)

    def close(self) -> None:
        """Kill the ranks and wait until they have exited."""
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            ranks.close()

    def _next_step(self, ranks: RankProcesses) -> Step:
        """Wait for a step and record whether it ends the execution. A failure ends it too."""
        self._done = True
        while True:
            rank, message = ranks.receive()
            if isinstance(message, RankFailed):
                raise (
                    _execution_error(ranks, message)
                    if message.serves
                    else RankLostError(f"rank {rank}: {message.message}")
                )
            if isinstance(message, Stepped):
                self._done = message.last
                return message.tokens


def _check_installed(config: ModelConfig) -> None:
    needed = ["torch", *(["transformers"] if isinstance(config, TransformersConfig) else [])]
    for package in needed:
        if find_spec(package) is None:
            raise_unsupported(f"{package} is not installed here: pip install 'maveriq[torch]'")


def _wait_until_loaded(ranks: RankProcesses) -> list[RankLoaded]:
    loaded: dict[int, RankLoaded] = {}
    while len(loaded) < len(ranks.pids):
        rank, message = ranks.receive()
        if isinstance(message, RankFailed):
            raise _root_cause([message, *ranks.pending_failures()])
        if isinstance(message, RankLoaded):
            loaded[rank] = message
    return [loaded[rank] for rank in range(len(ranks.pids))]


def _execution_error(ranks: RankProcesses, first: RankFailed) -> EngineError:
    """Wait until every rank has reported its failure to start an execution, and return the root cause."""
    failures = [first]
    while len(failures) < len(ranks.pids):
        _, message = ranks.receive()
        if isinstance(message, RankFailed):
            failures.append(message)
    return _root_cause(failures)


def _root_cause(failures: list[RankFailed]) -> EngineError:
    """Return the most specific failure: a plain `error` may only report that another rank failed."""
    cause = next((failure for failure in failures if failure.kind != FailureKind.ERROR), failures[0])
    return EngineError(FailureKind(cause.kind), cause.message, device=cause.device)
