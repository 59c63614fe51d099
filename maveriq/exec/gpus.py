"""What GPUs really hold and do: the protocol of a meter, and virtual GPUs for machines that have none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from maveriq.domain.hardware import Cluster, Gpu
from maveriq.errors import InvariantError
from maveriq.units import Bytes, gib


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuIdentity:
    """A GPU, or a slice of one that the driver gives out as a GPU (MIG)."""

    uuid: str
    name: str
    memory_bytes: Bytes
    is_slice: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """What a GPU holds and does now.

    Args:
        used_bytes: memory in use, by whomever.
        busy_share: share of the recent past in which it computed, 0 to 1; None where it cannot tell.
        energy_j: joules since some start that stays the same; None where it cannot tell.
    """

    used_bytes: Bytes
    busy_share: float | None = None
    energy_j: float | None = None


class GpuMeter(Protocol):
    """Looks at GPUs, numbered from 0. `slow` says that a reading asks a driver and is not for an event loop."""

    slow: bool

    @property
    def gpus(self) -> Sequence[GpuIdentity]:
        """The GPUs, in the order of their numbers."""

    def read(self) -> Sequence[GpuReading]:
        """Return a reading of each GPU."""

    def close(self) -> None:
        """Let the driver go. May be called twice."""


def cluster_of(meter: GpuMeter, *, name: str = "local") -> Cluster:
    """Return the metered GPUs as a cluster of one node; what they hold now counts as held when idle.

    Raises:
        InputError: there is none, or one has no memory left.
    """
    return Cluster(
        name=name,
        gpus=tuple(
            Gpu(gpu_id=gpu_id, node=0, kind=gpu.name, capacity_bytes=gpu.memory_bytes, idle_bytes=reading.used_bytes)
            for gpu_id, (gpu, reading) in enumerate(zip(meter.gpus, meter.read(), strict=True))
        ),
    )


@dataclass(slots=True)
class _Held:
    """What someone has of the virtual GPUs."""

    shares: Mapping[int, Bytes]
    busy_since_s: float | None = None


@dataclass(slots=True)
class VirtualMeter:
    """GPUs that are only numbers: memory is reserved and released by word, and so is computing.

    Args:
        memory_bytes: of each GPU.
        kind: their name.
        clock_s: tells the time.
    """

    memory_bytes: Sequence[Bytes]
    kind: str = "virtual"
    clock_s: Callable[[], float] = time.monotonic
    slow: bool = field(default=False, init=False)
    _held: dict[str, _Held] = field(default_factory=dict, init=False)
    _busy_s: list[float] = field(init=False)
    _read_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._busy_s = [0.0] * len(self.memory_bytes)
        self._read_s = self.clock_s()

    @property
    def gpus(self) -> tuple[GpuIdentity, ...]:
        """The GPUs, in the order of their numbers."""
        return tuple(
            GpuIdentity(uuid=f"VIRTUAL-{gpu_id}", name=self.kind, memory_bytes=memory)
            for gpu_id, memory in enumerate(self.memory_bytes)
        )

    def reserve(self, holder: str, shares: Mapping[int, Bytes]) -> None:
        """Give memory on each GPU to a holder.

        Raises:
            InvariantError: it holds some already, or a GPU lacks the room.
        """
        if holder in self._held:
            raise InvariantError(f"{holder} holds memory of virtual GPUs already")
        for gpu_id, amount in shares.items():
            free = self.memory_bytes[gpu_id] - self._used(gpu_id)
            if amount > free:
                raise InvariantError(
                    f"{holder} wants {gib(amount):.3f} GiB on virtual GPU {gpu_id}, which has {gib(free):.3f} GiB free"
                )
        self._held[holder] = _Held(shares=dict(shares))

    def release(self, holder: str) -> None:
        """Take a holder's memory back, all at once; nothing happens where it holds none."""
        self.rest(holder)
        self._held.pop(holder, None)

    def work(self, holder: str) -> None:
        """Note that a holder computes from now on; all its GPUs are busy."""
        held = self._held[holder]
        if held.busy_since_s is None:
            held.busy_since_s = self.clock_s()

    def rest(self, holder: str) -> None:
        """Note that a holder no longer computes."""
        held = self._held.get(holder)
        if held is not None:
            self._add_busy(held, self.clock_s())
            held.busy_since_s = None

    def read(self) -> tuple[GpuReading, ...]:
        """Return a reading of each GPU; its busy share is that since the last reading."""
        now_s = self.clock_s()
        for held in self._held.values():
            if held.busy_since_s is not None:
                self._add_busy(held, now_s)
                held.busy_since_s = now_s
        passed_s, self._read_s = now_s - self._read_s, now_s
        # Holders that share a GPU may compute at once, which makes it no busier than busy.
        shares = [min(1.0, busy_s / passed_s) if passed_s > 0 else 0.0 for busy_s in self._busy_s]
        self._busy_s = [0.0] * len(self.memory_bytes)
        return tuple(GpuReading(used_bytes=self._used(gpu_id), busy_share=share) for gpu_id, share in enumerate(shares))

    def close(self) -> None:
        """Nothing needs closing."""

    def _used(self, gpu_id: int) -> Bytes:
        return sum(held.shares.get(gpu_id, 0) for held in self._held.values())

    def _add_busy(self, held: _Held, now_s: float) -> None:
        if held.busy_since_s is not None:
            for gpu_id in held.shares:
                self._busy_s[gpu_id] += now_s - held.busy_since_s
