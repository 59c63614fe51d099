"""What an engine holds: memory of its GPUs, or on a CPU the memory of its processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from maveriq.exec.gpus import GpuMeter
from maveriq.exec.processes import children_of
from maveriq.units import Bytes

_PROC = Path("/proc")
_KIB = 1024


class MemoryMeter(Protocol):
    """Reads memory."""

    def before(self, gpu_ids: Sequence[int]) -> Bytes:
        """Return what is held of these GPUs while no engine of ours is."""

    def held(self, pid: int, gpu_ids: Sequence[int]) -> tuple[Bytes, Bytes]:
        """Return what an engine holds now and held at most: its leader's process, and its GPUs."""


class GpuMemory:
    """Reads the memory of this machine's GPUs, on which nothing else starts or stops.

    Args:
        meter: reads them.
        machine_gpus: their numbers on this machine; none for the first ones.
    """

    def __init__(self, meter: GpuMeter, machine_gpus: Sequence[int] = ()) -> None:
        self._meter = meter
        self._machine_gpus = machine_gpus
        self._before: dict[int, Bytes] = {}

    def before(self, gpu_ids: Sequence[int]) -> Bytes:
        """Return what is held of these GPUs while no engine of ours is."""
        self._before = self._used(gpu_ids)
        return sum(self._before.values())

    def held(self, pid: int, gpu_ids: Sequence[int]) -> tuple[Bytes, Bytes]:
        """Return what is held of these GPUs more than before; engines keep what they took, so it is also the most."""
        del pid
        now = sum(max(0, used - self._before.get(gpu, 0)) for gpu, used in self._used(gpu_ids).items())
        return now, now

    def _used(self, gpu_ids: Sequence[int]) -> dict[int, Bytes]:
        readings = self._meter.read()
        numbers = self._machine_gpus or range(len(readings))
        return {gpu: readings[numbers[gpu % len(numbers)]].used_bytes for gpu in gpu_ids}


class NoMemory:
    """Reads nothing: emulated engines hold no memory of a GPU."""

    def before(self, gpu_ids: Sequence[int]) -> Bytes:
        """Return 0."""
        del gpu_ids
        return 0

    def held(self, pid: int, gpu_ids: Sequence[int]) -> tuple[Bytes, Bytes]:
        """Return 0."""
        del pid, gpu_ids
        return 0, 0


class ProcessMemory:
    """Reads the memory of an engine's processes: what is theirs alone, without the files of libraries."""

    def before(self, gpu_ids: Sequence[int]) -> Bytes:
        """Return 0: a process holds nothing before it starts."""
        del gpu_ids
        return 0

    def held(self, pid: int, gpu_ids: Sequence[int]) -> tuple[Bytes, Bytes]:
        """Return the memory of all processes now, and the sum of the most that each held, libraries included."""
        del gpu_ids
        now = most = 0
        for process in _tree(pid):
            status = _status_kib(process)
            now += _KIB * (status.get("RssAnon", 0) + status.get("RssShmem", 0))
            most += _KIB * status.get("VmHWM", 0)
        return now, max(now, most)


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for child in children_of(pid):
        yield from _tree(child)


def _status_kib(pid: int) -> dict[str, int]:
    found: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "status").read_text(encoding="ascii", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                found[name] = int(value.split()[0])
    return found
