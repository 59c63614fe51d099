"""The ground that engines stand on: which GPUs are still being left by an engine that was stopped.

For the controller the memory of a stopped engine is free at once, as in the simulator. Real memory comes back
a little later, and the next engine on a GPU is held back until it is seen to be there.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from maveriq.units import Bytes, gib

_LOOK_EVERY_S = 0.1


class MemoryWatch(Protocol):
    """Somebody who can see how much of a GPU's memory is really free."""

    def free_bytes(self, gpu_id: int) -> Bytes | None:
        """Return what is free, None where nobody can tell."""


class NoMemoryWatch:
    """For GPUs that are only thought of: their memory comes back at once."""

    def free_bytes(self, gpu_id: int) -> Bytes | None:  # noqa: ARG002
        """Return None."""
        return None


class Ground:
    """Who is still leaving which GPU."""

    def __init__(self, watch: MemoryWatch) -> None:
        self._watch = watch
        self._leaving: Counter[int] = Counter()
        self._left: set[int] = set()  # GPUs that an engine has left and whose memory was not seen back since
        self._changed = asyncio.Condition()

    def leave(self, gpu_ids: Sequence[int]) -> None:
        """Note that an engine is being stopped."""
        self._leaving.update(gpu_ids)

    async def gone(self, gpu_ids: Sequence[int]) -> None:
        """Note that its processes are gone."""
        async with self._changed:
            self._leaving.subtract(gpu_ids)
            self._left.update(gpu_ids)
            self._changed.notify_all()

    async def clear(self, needed: Mapping[int, Bytes], within_s: float) -> str:
        """Wait until nobody is leaving these GPUs, and what an engine needs on each is seen to be free.

        Args:
            needed: memory by GPU.
            within_s: how long to wait for memory.

        Returns:
            A warning if it was not seen in time, else nothing.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: not any(self._leaving[gpu_id] for gpu_id in needed))
        loop = asyncio.get_running_loop()
        latest_s = loop.time() + within_s
        for gpu_id in [gpu_id for gpu_id in needed if gpu_id in self._left]:
            while (free := self._watch.free_bytes(gpu_id)) is not None and free < needed[gpu_id]:
                if loop.time() >= latest_s:
                    return (
                        f"GPU {gpu_id}: {gib(free):.2f} GiB were free {within_s:g} s after an engine left it, "
                        f"not the {gib(needed[gpu_id]):.2f} GiB that the next one needs"
                    )
                await asyncio.sleep(_LOOK_EVERY_S)
            self._left.discard(gpu_id)
        return ""
