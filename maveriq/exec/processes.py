"""What the kernel knows about processes: their parents, environment and open devices (Linux, `/proc`).

Engine servers and the executor use it, so it needs the standard library alone. All functions read files; a process
that ends meanwhile reads as absent.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

ENGINE_ID = "MAVERIQ_ENGINE_ID"
"""The environment variable that marks all processes of an engine, whatever their parents are."""

_PROC = Path("/proc")
_KERNEL_THREAD = 0x00200000  # PF_KTHREAD, linux/sched.h
_SHARED_MEMORY = "/dev/shm/"  # noqa: S108  (files of other processes are looked up there)
_CUDA_DEVICE = "/dev/nvidia-uvm"  # CUDA opens it, NVML does not


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStat:
    """A process, as `/proc/PID/stat` describes it (proc_pid_stat(5)).

    Args:
        pid: its id.
        name: of its program, at most 15 characters.
        ended: whether it is a zombie: it holds nothing any more.
        parent_pid: of the process that may wait for it.
        session: the id of its session.
        is_kernel_thread: whether it is part of the kernel.
        started_ticks: when it started, in clock ticks since boot; with the PID it identifies the process.
        wait_status: of a zombie, as `os.wait` returns it; 0 while it runs.
    """

    pid: int
    name: str
    ended: bool
    parent_pid: int
    session: int
    is_kernel_thread: bool
    started_ticks: int
    wait_status: int


def read_stat(pid: int) -> ProcessStat | None:
    """Return what the kernel knows about a process, None if it is gone."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    name, _, rest = text.partition("(")[2].rpartition(")")  # a name may contain parentheses
    fields = rest.split()
    return ProcessStat(
        pid=pid,
        name=name,
        ended=fields[0] in "ZX",
        parent_pid=int(fields[1]),
        session=int(fields[3]),
        is_kernel_thread=bool(int(fields[6]) & _KERNEL_THREAD),
        started_ticks=int(fields[19]),
        wait_status=int(fields[49]),
    )


def read_environment(pid: int) -> dict[str, str]:
    """Return the environment that a process started with; empty if it may not be read or does not exist yet."""
    try:
        data = (_PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return {}
    pairs = (entry.partition("=") for entry in data.decode(errors="replace").split("\0"))
    return {name: value for name, equals, value in pairs if equals}


def running_processes() -> frozenset[tuple[int, int]]:
    """Return a key of each process: its PID and the inode of its folder, which differs if the PID is used again."""
    try:
        with os.scandir(_PROC) as entries:
            return frozenset((int(entry.name), entry.inode()) for entry in entries if entry.name.isdigit())
    except OSError:
        return frozenset()  # no Linux


def children_of(pid: int) -> list[int]:
    """Return the PIDs of a process's children, also of those that have ended but were not waited for."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in (_PROC / str(pid) / "task").iterdir():
            with contextlib.suppress(OSError):
                found += map(int, (thread / "children").read_text(encoding="ascii").split())
    return found


def _open_files(pid: int) -> set[str]:
    found: set[str] = set()
    with contextlib.suppress(OSError):
        for descriptor in (_PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(str(descriptor.readlink()))
    return found


def has_open(pid: int, is_wanted: Callable[[Path], bool]) -> bool:
    """Return whether a process has an open file that is wanted.

    Args:
        pid: the process.
        is_wanted: decides by the link in `/proc/PID/fd`; an `OSError` counts as no.
    """
    with contextlib.suppress(OSError):
        for descriptor in (_PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                if is_wanted(descriptor):
                    return True
    return False


def uses_cuda(pid: int) -> bool:
    """Return whether a process has opened the device through which CUDA allocates memory."""
    return has_open(pid, lambda descriptor: str(descriptor.readlink()) == _CUDA_DEVICE)


def shared_memory_of(pid: int) -> set[str]:
    """Return the files in /dev/shm that a process has mapped."""
    found: set[str] = set()
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "maps").read_text(encoding="utf-8", errors="replace").splitlines():
            path = line.partition(_SHARED_MEMORY)[2]
            if path and not path.endswith(" (deleted)"):
                found.add(_SHARED_MEMORY + path)
    return found


def remove_unused_shared_memory(paths: Collection[str]) -> None:
    """Remove those of some files in /dev/shm that no process has mapped or open.

    A process that is killed leaves its files there: nothing but memory would show them.
    """
    unused = {path for path in paths if os.path.lexists(path)}
    for pid, _ in running_processes() if unused else ():
        unused -= shared_memory_of(pid)
        unused -= _open_files(pid)
    for path in unused:
        with contextlib.suppress(OSError):  # another user owns it
            Path(path).unlink()


def marked_processes(engine_id: str) -> Iterator[int]:
    """Yield the PIDs of all processes with an engine's mark, without this one. It reads each process of the machine."""
    for pid, _ in running_processes():
        if pid != os.getpid() and read_environment(pid).get(ENGINE_ID) == engine_id:
            yield pid


def describe_exit(code: int) -> str:
    """Return an exit code as text; a negative code is minus the number of the signal that killed the process."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
