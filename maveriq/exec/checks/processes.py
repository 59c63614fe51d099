"""The processes of an engine, found anew whenever a check asks.

The supervisor keeps its own account of an engine's processes (`maveriq.exec.process_tree`). That account is under test,
so a check does not rely on it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from maveriq.exec.processes import (
    ENGINE_ID,
    ProcessStat,
    has_open,
    read_environment,
    read_stat,
    running_processes,
    shared_memory_of,
)
from maveriq.units import Bytes

_PROC = Path("/proc")


def can_look() -> bool:
    """Return whether this machine has /proc."""
    return read_stat(os.getpid()) is not None


def engine_processes(leader_pid: int, log: Path) -> list[ProcessStat]:
    """Return the running processes of an engine.

    These are the leader, its session, all processes that inherited the engine's mark or have its log open, and the
    descendants of these. The log also finds a process that has cleared its environment and has lost its parent.
    """
    running = list(_running())
    mark = read_environment(leader_pid).get(ENGINE_ID)
    found = {
        process.pid
        for process in running
        if leader_pid in (process.pid, process.session)
        or (mark and read_environment(process.pid).get(ENGINE_ID) == mark)
        or _has_open(process.pid, log)
    } - {os.getpid()}
    grown = True
    while grown:
        more = {process.pid for process in running if process.parent_pid in found} - found
        grown, found = bool(more), found | more
    return [process for process in running if process.pid in found]


def still_running(processes: Iterable[ProcessStat]) -> list[ProcessStat]:
    """Return those that have not ended; a zombie has."""
    now = {(process.pid, process.started_ticks) for process in _running()}
    return [process for process in processes if (process.pid, process.started_ticks) in now]


def resident_bytes(process: ProcessStat) -> Bytes:
    """Return the memory that a process has in RAM, 0 if it has ended."""
    with contextlib.suppress(OSError):
        pages = (_PROC / str(process.pid) / "statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    return 0


def shared_memory_files(processes: Iterable[ProcessStat]) -> set[str]:
    """Return the files in /dev/shm that the processes have mapped."""
    return {path for process in processes for path in shared_memory_of(process.pid)}


def describe(process: ProcessStat) -> str:
    """Return a process as text."""
    return f"{process.name} (pid {process.pid})"


def _running() -> Iterator[ProcessStat]:
    stats = (read_stat(pid) for pid, _ in running_processes())
    return (stat for stat in stats if stat is not None and not stat.ended)


def _has_open(pid: int, file: Path) -> bool:
    return file.exists() and has_open(pid, lambda descriptor: descriptor.samefile(file))
