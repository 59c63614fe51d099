"""The processes of an engine as /proc shows them, found without help of the engine or its supervisor.

The code under test keeps its own account of an engine's processes; a check must not rely on it.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from maveriq.units import Bytes

_PROC = Path("/proc")
_SHARED_MEMORY = "/dev/shm/"  # noqa: S108  (files of other processes are looked up there)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessInfo:
    """A process. Its start time, in clock ticks, tells it from a later one with the same PID."""

    pid: int
    parent: int
    group: int
    session: int
    started: int
    name: str
    resident_bytes: Bytes

    def kill(self) -> None:
        """Send it SIGKILL, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


def can_look() -> bool:
    """Return whether this machine has /proc."""
    return (_PROC / "self" / "stat").exists()


def engine_processes(leader_pid: int, log: Path) -> list[ProcessInfo]:
    """Return the running processes of an engine.

    These are the leader, its session and group, all descendants of these, and whoever writes to the engine's log, which
    also finds a process that has left the session and whose parent has ended.
    """
    running = list(_running())
    found = {
        process.pid
        for process in running
        if leader_pid in (process.pid, process.group, process.session) or _writes_to(process.pid, log)
    } - {os.getpid()}
    grown = True
    while grown:
        more = {process.pid for process in running if process.parent in found} - found
        grown, found = bool(more), found | more
    return [process for process in running if process.pid in found]


def still_running(processes: Iterable[ProcessInfo]) -> list[ProcessInfo]:
    """Return those that have not ended; a zombie has."""
    now = {(process.pid, process.started) for process in _running()}
    return [process for process in processes if (process.pid, process.started) in now]


def shared_memory_files(processes: Iterable[ProcessInfo]) -> set[str]:
    """Return the files in /dev/shm that the processes have mapped."""
    found: set[str] = set()
    for process in processes:
        with contextlib.suppress(OSError):
            for line in (_PROC / str(process.pid) / "maps").read_text().splitlines():
                path = line.partition(_SHARED_MEMORY)[2]
                if path and not path.endswith(" (deleted)"):
                    found.add(_SHARED_MEMORY + path)
    return found


def _running() -> Iterator[ProcessInfo]:
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    for folder in _PROC.iterdir():
        if not folder.name.isdecimal():
            continue
        with contextlib.suppress(OSError):  # it has ended meanwhile
            head, _, tail = (folder / "stat").read_text().rpartition(")")
            fields = tail.split()
            if fields[0] not in "ZX":
                yield ProcessInfo(
                    pid=int(folder.name),
                    parent=int(fields[1]),
                    group=int(fields[2]),
                    session=int(fields[3]),
                    started=int(fields[19]),
                    name=head.partition("(")[2],
                    resident_bytes=int(fields[21]) * page_bytes,
                )


def _writes_to(pid: int, file: Path) -> bool:
    with contextlib.suppress(OSError):
        target = file.stat()
        for descriptor in (_PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                opened = descriptor.stat()
                if (opened.st_dev, opened.st_ino) == (target.st_dev, target.st_ino):
                    return True
    return False
