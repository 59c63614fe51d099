"""The GPUs of this machine, as NVIDIA's driver tells of them (NVML)."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from maveriq.domain.hardware import Cluster
from maveriq.errors import InputError, MaveriqError
from maveriq.exec.gpus import GpuIdentity, GpuReading, cluster_of

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
