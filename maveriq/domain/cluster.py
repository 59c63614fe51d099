"""The ledger of GPU memory, and the view of the cluster that a policy gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from maveriq.domain.hardware import Cluster
from maveriq.errors import InvariantError
from maveriq.units import Bytes, gib


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuView:
    """One GPU as a policy sees it.

    `load` is the share of recent one-second samples in which the GPU was busy, 0 to 1. A GPU
    that is down is not in the view.
    """

    gpu_id: int
    node: int
    capacity_bytes: Bytes
    free_bytes: Bytes
    load: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """The cluster at one instant: GPUs in the order of their ids. Nothing of the future."""

    gpus: tuple[GpuView, ...]

    def by_free_memory(self) -> list[GpuView]:
        """Return the GPUs, most free memory first; ties keep the order of ids."""
        return sorted(self.gpus, key=lambda gpu: -gpu.free_bytes)


@dataclass(slots=True)
class ClusterState:
    """Who holds how much memory on which GPU, and which GPUs are down.

    Invariant: no GPU ever holds more than its capacity (checked at each reservation).
    """

    cluster: Cluster
    _held: dict[int, dict[int, Bytes]] = field(default_factory=dict)
    _used: list[Bytes] = field(init=False)
    _open_faults: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._used = [gpu.idle_bytes for gpu in self.cluster.gpus]

    def reserve(self, deployment_id: int, shares: Mapping[int, Bytes]) -> None:
        """Give a deployment its memory on each GPU.

        Raises:
            InvariantError: it holds memory already, or a GPU lacks the room.
        """
        if deployment_id in self._held:
            raise InvariantError(f"deployment {deployment_id} holds memory already")
        for gpu_id, amount in shares.items():
            if amount > self.free_bytes(gpu_id):
                raise InvariantError(
                    f"deployment {deployment_id} wants {gib(amount):.3f} GiB on GPU {gpu_id}, "
                    f"which has {gib(self.free_bytes(gpu_id)):.3f} GiB free"
                )
        self._held[deployment_id] = dict(shares)
        for gpu_id, amount in shares.items():
            self._used[gpu_id] += amount

    def release(self, deployment_id: int) -> None:
        """Take a deployment's memory back.

        Raises:
            InvariantError: it holds none.
        """
        if deployment_id not in self._held:
            raise InvariantError(f"deployment {deployment_id} holds no memory to release")
        for gpu_id, amount in self._held.pop(deployment_id).items():
            self._used[gpu_id] -= amount

    def holds(self, deployment_id: int) -> bool:
        """Say whether a deployment holds memory."""
        return deployment_id in self._held

    def used_bytes(self, gpu_id: int) -> Bytes:
        """Return what is held on a GPU, idle memory included."""
        return self._used[gpu_id]

    def free_bytes(self, gpu_id: int) -> Bytes:
        """Return what is left on a GPU."""
        return self.cluster.gpus[gpu_id].capacity_bytes - self._used[gpu_id]

    def set_down(self, gpu_id: int, *, down: bool) -> None:
        """Note that a GPU failed, or that what made it fail is over; it is down while anything is."""
        self._open_faults[gpu_id] += 1 if down else -1

    def is_down(self, gpu_id: int) -> bool:
        """Say whether a GPU has failed."""
        return self._open_faults[gpu_id] > 0

    def view(self, loads: Sequence[float]) -> ClusterView:
        """Return the view for a policy; `loads` has one share per GPU, in the order of ids."""
        return ClusterView(
            gpus=tuple(
                GpuView(
                    gpu_id=gpu.gpu_id,
                    node=gpu.node,
                    capacity_bytes=gpu.capacity_bytes,
                    free_bytes=self.free_bytes(gpu.gpu_id),
                    load=load,
                )
                for gpu, load in zip(self.cluster.gpus, loads, strict=True)
                if not self.is_down(gpu.gpu_id)
            )
        )
