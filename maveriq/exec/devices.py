"""Which real devices stand behind the GPUs of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from maveriq.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """The device of each GPU of a cluster, in the order of their ids; none where engines run on the CPU.

    Several GPUs may share a device: then one big GPU plays several.

    Args:
        uuids: of the devices ("GPU-..."), one per GPU of the cluster.
    """

    uuids: tuple[str, ...] = ()

    @property
    def shared(self) -> bool:
        """Whether several GPUs share a device."""
        return len(set(self.uuids)) < len(self.uuids)

    def visible_to(self, gpu_ids: Sequence[int]) -> tuple[str, ...]:
        """Return the devices that an engine on these GPUs may see, each once, in rank order.

        Raises:
            InputError: there is no device for a GPU.
        """
        if self.uuids and max(gpu_ids) >= len(self.uuids):
            raise InputError(f"there is no device for GPU {max(gpu_ids)}: {len(self.uuids)} are known")
        return tuple(dict.fromkeys(self.uuids[gpu_id] for gpu_id in gpu_ids)) if self.uuids else ()

    def names(self, gpu_ids: Sequence[int]) -> tuple[str, ...]:
        """Return the device of each rank as the engine's process counts those that it sees."""
        visible = self.visible_to(gpu_ids)
        if not visible:
            return ("cpu",) * len(gpu_ids)
        return tuple(f"cuda:{visible.index(self.uuids[gpu_id])}" for gpu_id in gpu_ids)
