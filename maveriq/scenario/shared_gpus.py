"""Continuous engines that share a GPU take turns on it.

Each engine is a process of its own, and a GPU gives the processes that have work equal slices of its time (NVIDIA's
default, without MPS). So a step takes k times as long where k engines have requests when it starts; an engine on
several GPUs waits for the one that most share. That a step in progress keeps its pace, and that the host's part of a
step is slowed down like its kernels, are simplifications. Nothing here was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from maveriq.scenario.clocked_engine import ClockedEngine
from maveriq.units import Micros


class SharedGpus:
    """The continuous engines of a run, by deployment, and which of them share GPUs (mutable).

    Args:
        working: returns the most engines that have requests on one of some GPUs.
    """

    def __init__(self, working: Callable[[Iterable[int]], int]) -> None:
        self._working = working
        self._engines: dict[int, tuple[ClockedEngine, Sequence[int]]] = {}
        self._sharing: list[int] = []  # those that share a GPU, or did until just now

    def add(self, number: int, engine: ClockedEngine, gpu_ids: Sequence[int]) -> None:
        """Note an engine that starts on these GPUs."""
        self._engines[number] = engine, gpu_ids
        self._find_sharing()

    def drop(self, number: int) -> None:
        """Note that an engine has stopped."""
        if self._engines.pop(number, None) is not None:
            self._find_sharing()

    def shares(self, number: int) -> bool:
        """Return whether an engine shares a GPU, or did until just now."""
        return number in self._sharing

    def slow_down(self, now_us: Micros) -> list[int]:
        """Let steps that start from now on take as long as they do now; return the engines for which that is new."""
        if not self._sharing:
            return []
        changed = []
        for number in self._sharing:
            if number in self._engines:
                engine, gpu_ids = self._engines[number]
                if engine.slow_down(now_us, max(1, self._working(gpu_ids))):
                    changed.append(number)
        return changed

    def _find_sharing(self) -> None:
        on_gpu = Counter(gpu_id for _, gpu_ids in self._engines.values() for gpu_id in gpu_ids)
        sharing = [
            number for number, (_, gpu_ids) in self._engines.items() if any(on_gpu[gpu_id] > 1 for gpu_id in gpu_ids)
        ]
        self._sharing = list(dict.fromkeys([*self._sharing, *sharing]))
