"""How many continuous engines work on each GPU, and for how long any did."""

from __future__ import annotations

from collections.abc import Iterable

from maveriq.units import Micros


class GpuSharing:
    """Counts the engines that have requests, by GPU (mutable). Times never go back.

    Args:
        gpus: of the cluster.
    """

    def __init__(self, gpus: int) -> None:
        self._working = [0] * gpus
        self._since_us = [0] * gpus  # since when any works, where one does
        self._total_us = [0] * gpus  # of times that have ended

    def began(self, gpu_ids: Iterable[int], now_us: Micros) -> None:
        """Record that an engine on these GPUs has requests now."""
        for gpu_id in gpu_ids:
            if not self._working[gpu_id]:
                self._since_us[gpu_id] = now_us
            self._working[gpu_id] += 1

    def ended(self, gpu_ids: Iterable[int], now_us: Micros) -> None:
        """Record that an engine on these GPUs has no requests any more."""
        for gpu_id in gpu_ids:
            self._working[gpu_id] -= 1
            if not self._working[gpu_id]:
                self._total_us[gpu_id] += now_us - self._since_us[gpu_id]

    def working(self, gpu_ids: Iterable[int]) -> int:
        """Return the most engines that work on one of these GPUs."""
        return max(map(self._working.__getitem__, gpu_ids))

    def busy_us(self, gpu_id: int, now_us: Micros) -> Micros:
        """Return how long any engine has had requests on a GPU."""
        return self._total_us[gpu_id] + (now_us - self._since_us[gpu_id] if self._working[gpu_id] else 0)
