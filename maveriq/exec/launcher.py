"""What engines print, kept without filling the disk: engines may run for months, and be restarted for as long.

Starting engines: the `Launcher` protocol, and real processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias

from maveriq.errors import MaveriqError
from maveriq.exec.gpus import Devices
from maveriq.exec.messages import Channel, EngineSpec, FromEngine, StreamChannel, ToEngine, decode_from_engine

MAX_BYTES = 16 << 20
"""A log that has grown to this is put aside, in place of the one that was before, and begun anew."""

MAX_LOGS = 20
"""So many of the last logs of a deployment are kept, beside the first, which says best what is wrong."""

LOOK_EVERY_S = 10.0

_TAIL_BYTES = 4096
_LONGEST_LINE = 200


class EngineLog:
    """The log of one engine. Writers append to it (`O_APPEND`)."""

    def __init__(self, folder: Path, spec: EngineSpec) -> None:
        self.path = folder / f"{spec.deployment_id}-{spec.generation}.log"
        self._before = self.path.with_suffix(".log.before")
        oldest = folder / f"{spec.deployment_id}-{spec.generation - MAX_LOGS}.log"
        if spec.generation - MAX_LOGS > 1:
            for old in (oldest, oldest.with_suffix(".log.before")):
                with contextlib.suppress(OSError):
                    old.unlink()

    async def keep_short(self) -> None:
        """Look at its size now and then, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            with contextlib.suppress(OSError):  # gone, or the disk is full: then cutting it is all the more right
                if self.path.stat().st_size > MAX_BYTES:
                    await asyncio.to_thread(self._cut)

    def _cut(self) -> None:
        """Put what is there aside; a line that is printed meanwhile may be lost."""
        try:
            with self.path.open("rb") as now, self._before.open("wb") as before:
                while piece := now.read(1 << 20):
                    before.write(piece)
        finally:
            os.truncate(self.path, 0)

    def last_line(self) -> str:
        """Return the last line that says something, of its last few KiB."""
        return _last_line(self.path) or _last_line(self._before)


def _last_line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read(_TAIL_BYTES).decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip()[:_LONGEST_LINE] for line in reversed(lines) if line.strip()), "")


_PACKAGE_ROOT = Path(__file__).parents[2]

ToEngineChannel: TypeAlias = Channel[ToEngine, FromEngine]


class LaunchError(MaveriqError):
    """An engine's process could not be started, or ended before it was heard of."""


class EngineConnection(Protocol):
    """An engine's process group, and the channel to its leader."""

    @property
    def channel(self) -> ToEngineChannel:
        """The executor's end of the channel."""

    @property
    def pid(self) -> int:
        """The leader, which is also the number of the group."""

    async def wait_exit(self) -> int:
        """Wait until the leader is gone, end what is left of its group, and return its exit code (minus the signal)."""

    def terminate(self) -> None:
        """Ask the whole group to end."""

    def kill(self) -> None:
        """End the whole group."""

    def last_output(self) -> str:
        """Return the last line of the engine's log, if it left one."""


class Launcher(Protocol):
    """Starts engines."""

    async def launch(self, spec: EngineSpec, gpu_ids: Sequence[int]) -> EngineConnection:
        """Start an engine's process on these GPUs and return once it has connected. When cancelled it leaves nothing.

        Raises:
            LaunchError: it could not be started, or ended at once.
        """


class ProcessLauncher:
    """Starts engines as process groups of their own on this machine. Enter it first; leaving it removes its sockets.

    Args:
        backend: which engine they are to be.
        logs: an existing folder for what they print, a file per engine.
        devices: which devices stand behind the cluster's GPUs.
        environment: what they inherit, None for all of this process's.
    """

    def __init__(
        self, backend: str, *, logs: Path, devices: Devices | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self._backend = backend
        self._logs = logs
        self._devices = devices or Devices()
        self._environment = dict(os.environ if environment is None else environment)
        # A private folder (mode 700) with a short path: a socket's path may have some 100 bytes.
        self._sockets = tempfile.TemporaryDirectory(prefix="maveriq-")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sockets.cleanup()

    async def launch(self, spec: EngineSpec, gpu_ids: Sequence[int]) -> EngineConnection:
        """Start an engine's process; see `Launcher`."""
        path = Path(self._sockets.name) / f"{spec.deployment_id}-{spec.generation}"
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
        process = await self._spawn(path, log, visible)
        exited = asyncio.create_task(process.wait())
        try:
            either: tuple[asyncio.Future[Any], ...] = (connected, exited)
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            _signal_group(process.pid, signal.SIGKILL)
            await exited
            raise
        if connected.done():
            return ProcessConnection(process.pid, connected.result(), exited, log)
        words = log.last_line()
        raise LaunchError(f"its process ended with {describe_exit(exited.result())}" + (f": {words}" if words else ""))

    async def _spawn(self, path: Path, log: EngineLog, visible: Sequence[str]) -> asyncio.subprocess.Process:
        command = [
            sys.executable,
            "-P",
            "-m",
            "maveriq.exec.engine_server",
            "--socket",
            str(path),
            "--backend",
            self._backend,
        ]
        search = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), self._environment.get("PYTHONPATH", "")]))
        # What an engine may see of GPUs is fixed before it starts: libraries read it once, when they are imported.
        environment = self._environment | {
            "PYTHONPATH": search,
            "CUDA_VISIBLE_DEVICES": ",".join(visible),
            # What an engine that was killed leaves behind goes with the sockets.
            "TMPDIR": self._sockets.name,
        }
        try:
            with log.path.open("ab") as output:
                return await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise LaunchError(f"its process cannot be started: {error.strerror or error}") from None


class ProcessConnection:
    """A process group on this machine."""

    def __init__(self, pid: int, channel: ToEngineChannel, exited: asyncio.Task[int], log: EngineLog) -> None:
        self._pid = pid
        self._channel = channel
        self._exited = exited
        self._log = log
        tidying = asyncio.create_task(log.keep_short())

        def ended(_: object) -> None:
            # What is left of the group goes at once: later its number could be another's.
            _signal_group(pid, signal.SIGKILL)
            tidying.cancel()

        exited.add_done_callback(ended)

    @property
    def channel(self) -> ToEngineChannel:
        """The executor's end of the channel."""
        return self._channel

    @property
    def pid(self) -> int:
        """The leader, which is also the number of the group."""
        return self._pid

    async def wait_exit(self) -> int:
        """Wait until the leader is gone; see `EngineConnection`."""
        return await asyncio.shield(self._exited)

    def terminate(self) -> None:
        """Ask the whole group to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the whole group."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if not self._exited.done():
            _signal_group(self._pid, number)

    def last_output(self) -> str:
        """Return the last line of the engine's log, if it left one."""
        return self._log.last_line()


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already
        os.killpg(pid, number)


def describe_exit(code: int) -> str:
    """Return how a process ended, in words; minus a signal's number says that it was killed by that."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
