"""What GPUs really hold and do: the protocol of a meter, and virtual GPUs for machines that have none.

Which real devices stand behind the GPUs of a cluster.
The GPUs of this machine, as NVIDIA's driver tells of them (NVML).
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from maveriq.domain.cluster import Cluster, Gpu
from maveriq.errors import InputError, InvariantError, MaveriqError
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


_MILLIJOULES = 1000.0


class NvmlMeter:
    """Reads GPUs through NVML, all of the machine's in the order of the PCI bus.

    It does not look at CUDA_VISIBLE_DEVICES. Where a GPU is cut into slices (MIG), each slice stands for one; it tells
    its memory, but neither how busy it is nor its energy.

    Raises:
        InputError: the package or the driver is missing, or there is no GPU.
    """

    slow = True

    def __init__(self) -> None:
        self._nvml = _import_nvml()
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            raise InputError(f"no NVIDIA driver answers ({error}); run where there is one") from None
        self._open = True
        self._handles: list[Any] = []
        self._gpus: tuple[GpuIdentity, ...] = ()
        try:
            devices = list(self._devices())
            self._handles = [handle for handle, _ in devices]
            self._gpus = tuple(self._identity(handle, is_slice=is_slice) for handle, is_slice in devices)
        except self._nvml.NVMLError as error:
            self.close()
            raise InputError(f"the NVIDIA driver does not tell its GPUs: {error}") from None
        if not self._gpus:
            self.close()
            raise InputError("the NVIDIA driver knows no GPU; run where there is one")

    @property
    def gpus(self) -> tuple[GpuIdentity, ...]:
        """The GPUs, in the order of their numbers."""
        return self._gpus

    def read(self) -> tuple[GpuReading, ...]:
        """Return a reading of each GPU; its busy share is the driver's own, over the last 1/6 s to 1 s.

        Raises:
            MaveriqError: a GPU does not answer any more.
        """
        return tuple(self._read_one(number, handle) for number, handle in enumerate(self._handles))

    def close(self) -> None:
        """Let the driver go. May be called twice."""
        if self._open:
            self._open = False
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def _devices(self) -> Iterator[tuple[Any, bool]]:
        """Yield handles of GPUs, and of slices in place of the GPUs that are cut, and whether it is a slice."""
        nvml = self._nvml
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            mode = self._told(nvml.nvmlDeviceGetMigMode, handle)
            if mode is None or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
                yield handle, False
                continue
            for position in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
                piece = self._told(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, position)
                if piece is not None:
                    yield piece, True

    def _identity(self, handle: Any, *, is_slice: bool) -> GpuIdentity:
        nvml = self._nvml
        return GpuIdentity(
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            name=_text(nvml.nvmlDeviceGetName(handle)),
            memory_bytes=int(self._memory(handle).total),
            is_slice=is_slice,
        )

    def _memory(self, handle: Any) -> Any:
        # Version 2 tells what the driver keeps for itself apart, which is not the models' doing; old drivers lack it.
        nvml = self._nvml
        told = self._told(nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
        return nvml.nvmlDeviceGetMemoryInfo(handle) if told is None else told

    def _read_one(self, number: int, handle: Any) -> GpuReading:
        nvml = self._nvml
        try:
            memory = self._memory(handle)
            # What the driver keeps for itself is no room for models either.
            used_bytes = int(memory.used) + int(getattr(memory, "reserved", 0))
            rates = self._told(nvml.nvmlDeviceGetUtilizationRates, handle)
            millijoules = self._told(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        except nvml.NVMLError as error:
            raise MaveriqError(f"GPU {number} ({self._gpus[number].name}) does not answer: {error}") from None
        return GpuReading(
            used_bytes=used_bytes,
            busy_share=None if rates is None else rates.gpu / 100,
            energy_j=None if millijoules is None else millijoules / _MILLIJOULES,
        )

    def _told(self, ask: Callable[..., Any], *arguments: Any) -> Any:
        """Return what the driver tells, None where this GPU cannot tell it, or not to us."""
        nvml = self._nvml
        soft = (
            nvml.NVMLError_NotSupported,
            nvml.NVMLError_NoPermission,
            nvml.NVMLError_NotFound,
            nvml.NVMLError_FunctionNotFound,
            nvml.NVMLError_InvalidArgument,
        )
        try:
            return ask(*arguments)
        except soft:
            return None


def real_cluster() -> Cluster:
    """Return the GPUs of this machine as a cluster; memory that is in use now counts as held when idle.

    Raises:
        InputError: there is none to be seen.
    """
    meter = NvmlMeter()
    try:
        return cluster_of(meter)
    finally:
        meter.close()


def _import_nvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        raise InputError("GPUs are read with nvidia-ml-py; install it with: pip install 'maveriq[gpu]'") from None


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
