"""Launches engine processes, connects to them, and keeps their output in log files of limited size.

`Launcher` and `EngineConnection` are the protocols that the executor uses; tests implement them with simulated engines.
`ProcessLauncher` starts a process group on this machine and waits until its leader connects to a Unix socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self, TypeAlias

from maveriq.errors import MaveriqError, cannot_write
from maveriq.exec.capabilities import check_spec
from maveriq.exec.engine_python import NOT_INHERITED, link_package, python_environment
from maveriq.exec.engines.engine import EngineError
from maveriq.exec.engines.interpreter import module_command
from maveriq.exec.gpus import Devices
from maveriq.exec.messages import Channel, EngineSpec, FromEngine, StreamChannel, ToEngine, decode_from_engine
from maveriq.exec.process_tree import ProcessTree, ProcessTrees
from maveriq.exec.processes import ENGINE_ID, describe_exit
from maveriq.exec.scratch_folder import ScratchFolder

ToEngineChannel: TypeAlias = Channel[ToEngine, FromEngine]


class LaunchError(MaveriqError):
    """An engine's process could not be started, or exited before it connected.

    Args:
        message: why, in one line.
        retryable: False where another start cannot help.
    """

    def __init__(self, message: str, *, retryable: bool = True) -> None:
        super().__init__(message)
        self.retryable = retryable


class EngineConnection(Protocol):
    """An engine's processes, and the channel to their leader."""

    @property
    def channel(self) -> ToEngineChannel:
        """The executor's end of the channel."""

    @property
    def pid(self) -> int:
        """The PID of the leader, which is also the id of its process group."""

    @property
    def rank_lost(self) -> asyncio.Future[str]:
        """Gets a description of the first rank that ends while the leader runs and nobody ends the engine."""

    def engine_loaded(self, rank_pids: Sequence[int]) -> None:
        """Find out which processes are ranks: from now on the end of one sets `rank_lost`.

        Args:
            rank_pids: the process of each rank that the engine names, in rank order; 0 for one that it does not know.
        """

    async def wait_exit(self) -> int:
        """Wait until the leader has exited and return its exit code, or minus the number of the signal that killed it.

        The other processes are killed then.
        """

    async def wait_gone(self) -> None:
        """Wait until all processes have ended. Only then is their GPU memory free."""

    def terminate(self) -> None:
        """Send SIGTERM to all processes."""

    def kill(self) -> None:
        """Send SIGKILL to all processes."""

    def last_output(self) -> str:
        """Return the last line of the engine's log, "" if there is none."""


class Launcher(Protocol):
    """Starts engines."""

    async def launch(self, spec: EngineSpec, gpu_ids: Sequence[int]) -> EngineConnection:
        """Start an engine's process on these GPUs and return once it has connected.

        If the call is cancelled, the process is killed.

        Raises:
            LaunchError: the process cannot be started, or exits before it connects.
        """


class ProcessLauncher:
    """Starts each engine as a process group on this machine, and tracks the processes that leave the group.

    Use it as a context manager: leaving it removes the sockets and the temporary files of engines. Those of a process
    that was killed are removed here.

    Args:
        backend: the name of the engine to start.
        logs: an existing folder for the output of engines, one file each.
        devices: the devices behind the cluster's GPUs.
        environment: the environment that engines inherit, without the service's token; None for that of this process.
        python: the interpreter that runs engines; None for the one of this process. Another one sees no package of this
            environment but maveriq itself, and inherits no PYTHONPATH.

    Raises:
        MaveriqError: the folder for the sockets cannot be created.
    """

    def __init__(
        self,
        backend: str,
        *,
        logs: Path,
        devices: Devices | None = None,
        environment: Mapping[str, str] | None = None,
        python: Path | None = None,
    ) -> None:
        self._backend = backend
        self._logs = logs
        self._devices = devices or Devices()
        inherited = os.environ if environment is None else environment
        self._environment = {name: value for name, value in inherited.items() if name not in NOT_INHERITED}
        self._python = python
        try:
            self._sockets = ScratchFolder("maveriq-engines-")  # a short path: sockets allow about 100 bytes
            import_path = link_package(self._sockets.path)
        except OSError as error:
            raise cannot_write("the folder of temporary files", error) from None
        self._environment |= python_environment(self._environment, import_path, python)
        self._trees = ProcessTrees()
        self._launches = itertools.count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._trees.close()
        self._sockets.cleanup()

    async def launch(self, spec: EngineSpec, gpu_ids: Sequence[int]) -> EngineConnection:
        """Start an engine's process; see `Launcher`."""
        try:
            check_spec(self._backend, spec)
        except EngineError as error:
            raise LaunchError(f"its engine cannot load ({error.kind}): {error}", retryable=False) from None
        path = self._sockets.path / f"{spec.deployment_id}-{spec.generation}"
        log = EngineLog(self._logs, spec)
        connected: asyncio.Future[ToEngineChannel] = asyncio.get_running_loop().create_future()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if connected.done():
                writer.close()  # an engine connects once
            else:
                connected.set_result(StreamChannel(reader, writer, decode_from_engine))

        try:
            server = await asyncio.start_unix_server(accept, path)
        except OSError as error:
            raise LaunchError(f"cannot listen for an engine: {error.strerror or error}") from None
        try:
            return await self._start(path, log, self._devices.visible_to(gpu_ids), connected)
        finally:
            server.close()
            path.unlink(missing_ok=True)

    async def _start(
        self, path: Path, log: EngineLog, visible: Sequence[str], connected: asyncio.Future[ToEngineChannel]
    ) -> EngineConnection:
        engine_id = f"{self._sockets.path.name}/{next(self._launches)}"  # the folder's name is random
        process = await self._spawn(path, log, visible, engine_id)
        tree = self._trees.track(engine_id, process.pid)
        exited = asyncio.create_task(process.wait())
        exited.add_done_callback(lambda _: tree.leader_exited())
        try:
            first_of: tuple[asyncio.Future[Any], ...] = (connected, exited)
            await asyncio.wait(first_of, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            _signal_group(process.pid, signal.SIGKILL)
            await exited
            raise
        if connected.done():
            return ProcessConnection(tree, connected.result(), exited, log)
        output = log.last_line()
        reason = f"its process ended with {describe_exit(exited.result())}"
        raise LaunchError(f"{reason}: {output}" if output else reason)

    async def _spawn(
        self, path: Path, log: EngineLog, visible: Sequence[str], engine_id: str
    ) -> asyncio.subprocess.Process:
        command = module_command(str(self._python or sys.executable), "maveriq.exec.engine_server")
        command += ["--socket", str(path), "--backend", self._backend]
        # Libraries read CUDA_VISIBLE_DEVICES once, when they are imported, so it is set before the process starts.
        environment = self._environment | {
            "CUDA_VISIBLE_DEVICES": ",".join(visible),
            ENGINE_ID: engine_id,
            # Temporary files of killed engines are removed together with the sockets.
            "TMPDIR": str(self._sockets.path),
        }
        try:
            with log.open() as output:
                return await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environment,
                    start_new_session=True,
                )
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread that waits for its end
            reason = error.strerror if isinstance(error, OSError) else None
            raise LaunchError(f"its process cannot be started: {reason or error}") from None


class ProcessConnection:
    """A connection to the processes of an engine on this machine."""

    def __init__(self, tree: ProcessTree, channel: ToEngineChannel, exited: asyncio.Task[int], log: EngineLog) -> None:
        self._tree = tree
        self._channel = channel
        self._exited = exited
        self._log = log
        limiting_log = asyncio.create_task(log.limit_size())

        def on_exit(_: object) -> None:
            # Kill the rest of the group at once: the PID may be reused later.
            _signal_group(tree.leader, signal.SIGKILL)
            limiting_log.cancel()

        exited.add_done_callback(on_exit)

    @property
    def channel(self) -> ToEngineChannel:
        """The executor's end of the channel."""
        return self._channel

    @property
    def pid(self) -> int:
        """The PID of the leader, which is also the id of its process group."""
        return self._tree.leader

    @property
    def rank_lost(self) -> asyncio.Future[str]:
        """Gets a description of the first rank that ends; see `EngineConnection`."""
        return self._tree.rank_lost

    def engine_loaded(self, rank_pids: Sequence[int]) -> None:
        """Find out which processes are ranks; see `EngineConnection`."""
        self._tree.engine_loaded(rank_pids)

    async def wait_exit(self) -> int:
        """Wait until the leader has exited; see `EngineConnection`."""
        return await asyncio.shield(self._exited)

    async def wait_gone(self) -> None:
        """Wait until all processes have ended."""
        await asyncio.shield(self._tree.gone)

    def terminate(self) -> None:
        """Send SIGTERM to all processes."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to all processes."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        self._tree.send_signal(number)
        if not self._exited.done():
            _signal_group(self._tree.leader, number)

    def last_output(self) -> str:
        """Return the last line of the engine's log, "" if there is none."""
        return self._log.last_line()


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the group has ended
        os.killpg(pid, number)


MAX_LOG_BYTES = 16 << 20
"""A log that exceeds this is moved to `.log.before`, replacing the previous one, and starts again empty."""

MAX_LOGS = 20
"""Logs kept per deployment: the most recent ones, and the first, which best shows what is wrong."""

SIZE_CHECK_INTERVAL_S = 10.0

_TAIL_BYTES = 4096
_MAX_LINE_LENGTH = 200


class EngineLog:
    """The log file of one engine. The engine appends to it (`O_APPEND`); its size and the number of logs are limited.

    Engines may run, and restart, for months.
    """

    def __init__(self, folder: Path, spec: EngineSpec) -> None:
        self.path = folder / f"{spec.deployment_id}-{spec.generation}.log"
        self._rotated = self.path.with_suffix(".log.before")
        expired_generation = spec.generation - MAX_LOGS
        if expired_generation > 1:
            expired = folder / f"{spec.deployment_id}-{expired_generation}.log"
            for path in (expired, expired.with_suffix(".log.before")):
                with contextlib.suppress(OSError):
                    path.unlink()

    def open(self) -> BinaryIO:
        """Open the log to append to it; only its owner may read it.

        Raises:
            OSError: it cannot be opened.
        """
        return _open_private(self.path, os.O_APPEND)

    async def limit_size(self) -> None:
        """Rotate the log whenever it is too large, until cancelled."""
        while True:
            await asyncio.sleep(SIZE_CHECK_INTERVAL_S)
            with contextlib.suppress(OSError):  # the file is gone or the disk is full; rotating truncates it anyway
                if self.path.stat().st_size > MAX_LOG_BYTES:
                    await asyncio.to_thread(self._rotate)

    def _rotate(self) -> None:
        """Copy the log aside and truncate it; lines that are printed meanwhile may be lost."""
        try:
            with self.path.open("rb") as log, _open_private(self._rotated, os.O_TRUNC) as rotated:
                while chunk := log.read(1 << 20):
                    rotated.write(chunk)
        finally:
            os.truncate(self.path, 0)

    def last_line(self) -> str:
        """Return the last line that is not blank, shortened; "" if there is none in the last few KiB."""
        return _last_line(self.path) or _last_line(self._rotated)


def _open_private(path: Path, flags: int) -> BinaryIO:
    """Open a file to write that only its owner may read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        with contextlib.suppress(OSError):  # it was there, and is another user's
            os.fchmod(descriptor, 0o600)
    return open(descriptor, "wb")  # noqa: PTH123  (the caller closes it)


def _last_line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read(_TAIL_BYTES).decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip()[:_MAX_LINE_LENGTH] for line in reversed(lines) if line.strip()), "")
