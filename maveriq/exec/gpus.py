"""The GPUs of this machine: their identity and memory (NVML), and which of them a cluster's GPUs are.

`pynvml` is imported when a `NvmlMeter` is created, not with this module.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from maveriq.domain.cluster import Cluster, Gpu
from maveriq.errors import InputError, MaveriqError
from maveriq.units import Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuIdentity:
    """A GPU, or a MIG slice of one.

    Args:
        uuid: as `CUDA_VISIBLE_DEVICES` takes it.
        name: the driver's name.
        memory_bytes: its memory.
        is_slice: it is a slice.
        compute_capability: CUDA's number of the generation, such as 8.9; None where the driver does not say.
    """

    uuid: str
    name: str
    memory_bytes: Bytes
    is_slice: bool = False
    compute_capability: float | None = None


def least_compute_capability(gpus: Sequence[GpuIdentity]) -> float | None:
    """Return the least compute capability of GPUs; None where one is unknown, or without GPUs."""
    known = [gpu.compute_capability for gpu in gpus if gpu.compute_capability is not None]
    return min(known) if known and len(known) == len(gpus) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """The state of a GPU at one instant.

    Args:
        used_bytes: memory in use by all processes.
        busy_share: utilization over the recent past, 0 to 1; None if unknown.
        energy_j: energy counter in joules, from a fixed but unknown start; None if unknown.
    """

    used_bytes: Bytes
    busy_share: float | None = None
    energy_j: float | None = None


class GpuLostError(MaveriqError):
    """A GPU is gone until the machine or the GPU is reset; no engine can start on it."""


class GpuMeter(Protocol):
    """Reads GPUs, numbered from 0. `slow` says that a reading calls a driver and must not run in an event loop."""

    slow: bool

    @property
    def gpus(self) -> Sequence[GpuIdentity]:
        """The GPUs, in the order of their numbers."""

    def read(self) -> Sequence[GpuReading]:
        """Return a reading of each GPU."""

    def close(self) -> None:
        """Release the driver. May be called twice."""


def cluster_of(meter: GpuMeter, *, name: str = "local") -> Cluster:
    """Return the metered GPUs as a cluster of one node; memory that is in use now counts as used when idle.

    Raises:
        InputError: there is no GPU, or one has no memory left.
    """
    return Cluster(
        name=name,
        gpus=tuple(
            Gpu(gpu_id=gpu_id, node=0, kind=gpu.name, capacity_bytes=gpu.memory_bytes, idle_bytes=reading.used_bytes)
            for gpu_id, (gpu, reading) in enumerate(zip(meter.gpus, meter.read(), strict=True))
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """The device behind each GPU of a cluster, by GPU id; empty if engines run on the CPU.

    Several GPUs of the cluster may share one device.

    Args:
        uuids: of the devices ("GPU-..."), one per GPU of the cluster.
    """

    uuids: tuple[str, ...] = ()

    @property
    def shared(self) -> bool:
        """Whether several GPUs share a device."""
        return len(set(self.uuids)) < len(self.uuids)

    def visible_to(self, gpu_ids: Sequence[int]) -> tuple[str, ...]:
        """Return the UUIDs for `CUDA_VISIBLE_DEVICES` of an engine on these GPUs, each once, in rank order.

        Raises:
            InputError: a GPU has no device.
        """
        if self.uuids and max(gpu_ids) >= len(self.uuids):
            raise InputError(f"there is no device for GPU {max(gpu_ids)}: {len(self.uuids)} are known")
        return tuple(dict.fromkeys(self.uuids[gpu_id] for gpu_id in gpu_ids)) if self.uuids else ()

    def names(self, gpu_ids: Sequence[int]) -> tuple[str, ...]:
        """Return the device name of each rank ("cuda:0", ...) among the visible devices, or "cpu"."""
        visible = self.visible_to(gpu_ids)
        if not visible:
            return ("cpu",) * len(gpu_ids)
        return tuple(f"cuda:{visible.index(self.uuids[gpu_id])}" for gpu_id in gpu_ids)


_MILLIJOULES = 1000.0


class NvmlMeter:
    """Reads all GPUs of the machine through NVML, in PCI bus order.

    CUDA_VISIBLE_DEVICES is ignored. Each slice of a partitioned GPU (MIG) counts as a GPU; NVML reports its memory, but
    not its utilization or energy.

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
            raise InputError(f"the NVIDIA driver does not list its GPUs: {error}") from None
        if not self._gpus:
            self.close()
            raise InputError("the NVIDIA driver knows no GPU; run where there is one")

    @property
    def gpus(self) -> tuple[GpuIdentity, ...]:
        """The GPUs, in the order of their numbers."""
        return self._gpus

    @property
    def driver(self) -> str:
        """The version of the driver."""
        return _text(self._nvml.nvmlSystemGetDriverVersion())

    def clock_mhz(self, number: int) -> float:
        """Return the clock of a GPU's multiprocessors now; 0 where the driver does not say."""
        clock = self._query(self._nvml.nvmlDeviceGetClockInfo, self._handles[number], self._nvml.NVML_CLOCK_SM)
        return float(clock or 0)

    def read(self) -> tuple[GpuReading, ...]:
        """Return a reading of each GPU; `busy_share` is the driver's, over the last 1/6 s to 1 s.

        Raises:
            MaveriqError: a GPU no longer answers.
        """
        return tuple(map(self.read_one, range(len(self._handles))))

    def read_one(self, number: int) -> GpuReading:
        """Return a reading of one GPU.

        Raises:
            GpuLostError: the driver has lost it.
            MaveriqError: it does not answer.
        """
        nvml, handle = self._nvml, self._handles[number]
        where = f"GPU {number} of this machine ({self._gpus[number].name})"
        try:
            memory = self._memory(handle)
            # Memory that the driver reserves is not available to models.
            used_bytes = int(memory.used) + int(getattr(memory, "reserved", 0))
            rates = self._query(nvml.nvmlDeviceGetUtilizationRates, handle)
            millijoules = self._query(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        except (nvml.NVMLError_GpuIsLost, nvml.NVMLError_ResetRequired) as error:
            raise GpuLostError(f"{where} is lost: {error}") from None
        except nvml.NVMLError as error:
            raise MaveriqError(f"{where} does not answer: {error}") from None
        return GpuReading(
            used_bytes=used_bytes,
            busy_share=None if rates is None else rates.gpu / 100,
            energy_j=None if millijoules is None else millijoules / _MILLIJOULES,
        )

    def close(self) -> None:
        """Release the driver. May be called twice."""
        if self._open:
            self._open = False
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def _devices(self) -> Iterator[tuple[Any, bool]]:
        """Yield handles of GPUs, or of the slices of partitioned GPUs, and whether it is a slice."""
        nvml = self._nvml
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            mode = self._query(nvml.nvmlDeviceGetMigMode, handle)
            if mode is None or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
                yield handle, False
                continue
            for position in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
                piece = self._query(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, position)
                if piece is not None:
                    yield piece, True

    def _identity(self, handle: Any, *, is_slice: bool) -> GpuIdentity:
        nvml = self._nvml
        return GpuIdentity(
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            name=_text(nvml.nvmlDeviceGetName(handle)),
            memory_bytes=int(self._memory(handle).total),
            is_slice=is_slice,
            compute_capability=self._compute_capability(handle),
        )

    def _compute_capability(self, handle: Any) -> float | None:
        found = self._query(self._nvml.nvmlDeviceGetCudaComputeCapability, handle)
        return None if found is None else found[0] + found[1] / 10

    def _memory(self, handle: Any) -> Any:
        # Version 2 reports the driver's reserved memory separately; old drivers lack it.
        nvml = self._nvml
        memory = self._query(nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
        return nvml.nvmlDeviceGetMemoryInfo(handle) if memory is None else memory

    def _query(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return the driver's answer, None if this GPU does not support the query or does not permit it."""
        nvml = self._nvml
        unsupported = (
            nvml.NVMLError_NotSupported,
            nvml.NVMLError_NoPermission,
            nvml.NVMLError_NotFound,
            nvml.NVMLError_FunctionNotFound,
            nvml.NVMLError_InvalidArgument,
        )
        try:
            return function(*arguments)
        except unsupported:
            return None


def real_cluster() -> Cluster:
    """Return the GPUs of this machine as a cluster; memory that is in use now counts as used when idle.

    Raises:
        InputError: no GPU is visible.
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
        message = "nvidia-ml-py, which reads the GPUs, is not installed; install it with: pip install 'maveriq[gpu]'"
        raise InputError(message) from None


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
