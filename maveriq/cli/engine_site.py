"""What a user says about the engines of `maveriq run`, and what this machine has for them."""

from __future__ import annotations

from dataclasses import dataclass

from maveriq.domain.cluster import Cluster
from maveriq.errors import InputError, MaveriqError, UnknownNameError
from maveriq.estimate.estimator import Estimator
from maveriq.exec.capabilities import Device, SupportedByEngine, installed, this_machine
from maveriq.exec.engine_process import SupervisionSettings
from maveriq.exec.engines.engine import BACKENDS
from maveriq.exec.gpu_sampling import GpuSampler
from maveriq.exec.gpus import Devices, GpuReading, NvmlMeter
from maveriq.units import Bytes, gib

EMULATED, _REAL = "emulated", "trtllm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """What a user says about engines; fields as the options of `maveriq run`.

    Raises:
        InputError: options that do not go together, or cannot be.
        UnknownNameError: no such backend.
    """

    backend: str | None
    real: bool
    time_scale: float
    start_timeout_s: float
    hang_timeout_s: float
    max_restarts: int

    def __post_init__(self) -> None:
        for name in ("time_scale", "start_timeout_s", "hang_timeout_s"):
            value = getattr(self, name)
            if not 0 < value <= 1e6:  # nan too
                raise InputError(f"--{name.replace('_', '-')} must be positive and at most 1,000,000, not {value}")
        if self.max_restarts < 1:
            raise InputError(f"--max-restarts must be at least 1, not {self.max_restarts}")
        self._check_backend()

    def _check_backend(self) -> None:
        if self.real and self.backend not in (None, _REAL):
            raise InputError(f"--real means TensorRT-LLM; leave it out to run on {self.backend!r}")
        if self.backend is None and not self.real:
            raise InputError(
                "say what to run on: --backend emulated (processes that take the estimated time, no GPU needed), "
                "torch or vllm, or --real (TensorRT-LLM); to run on nothing at all, try maveriq sim"
            )
        if self.name not in BACKENDS:
            raise UnknownNameError("backend", self.name, BACKENDS)
        if self.time_scale != 1 and self.name != EMULATED:
            raise InputError(f"--time-scale {self.time_scale:g} is for emulated engines: real ones take their own time")

    @property
    def name(self) -> str:
        """The backend."""
        return self.backend or _REAL

    def supervision(self) -> SupervisionSettings:
        """Return how patient to be."""
        return SupervisionSettings(
            start_timeout_s=self.start_timeout_s, hang_timeout_s=self.hang_timeout_s, max_restarts=self.max_restarts
        )


class Site:
    """What this machine has for a backend: its GPUs where it has any, else its CPU, and nothing for emulated engines.

    Raises:
        InputError: the backend cannot start here; the message says what it lacks.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.meter: NvmlMeter | None = None
        if backend == EMULATED:
            return
        machine = this_machine()
        missing = installed(backend, machine).missing
        if missing:
            named = "--real (TensorRT-LLM)" if backend == _REAL else f"--backend {backend}"
            raise InputError(f"{named} cannot run here: {missing}")
        if machine.gpus:
            self.meter = NvmlMeter()

    def planning(self, base: Estimator) -> Estimator:
        """Return the estimator to plan with: one that knows what the backend cannot do."""
        if self.backend == EMULATED:
            return base
        device = Device.CUDA if self.meter else Device.CPU
        slices = self.meter is not None and any(gpu.is_slice for gpu in self.meter.gpus)
        return SupportedByEngine(base=base, engine=self.backend, device=device, slices=slices)

    def devices(self, cluster: Cluster) -> Devices:
        """Return which device stands behind each GPU of a cluster; several share one where there are fewer.

        Raises:
            InputError: a device has not the memory that the cluster's GPUs on it have.
        """
        if self.meter is None:
            return Devices()
        there = self.meter.gpus
        for index, gpu in enumerate(there):
            wanted = sum(one.capacity_bytes for one in cluster.gpus[index :: len(there)])
            if wanted > gpu.memory_bytes:
                raise InputError(
                    f"cluster {cluster.name!r} has {gib(wanted):.1f} GiB where this machine's GPU {index} ({gpu.name}) "
                    f"has {gib(gpu.memory_bytes):.1f} GiB; describe what is there in a file, and name it with --gpus"
                )
        return Devices(uuids=tuple(there[gpu.gpu_id % len(there)].uuid for gpu in cluster.gpus))

    def memory_probe(self) -> SiteMemory | None:
        """Return who sees the memory of the GPUs, None where there are none."""
        return SiteMemory(self.meter) if self.meter else None

    def sampler(self, cluster: Cluster) -> GpuSampler | None:
        """Return who sees how busy the GPUs are; None where there are none, or several of the cluster's share one."""
        return None if self.meter is None or self.devices(cluster).shared else GpuSampler(self.meter)

    def close(self) -> None:
        """Let the driver go."""
        if self.meter is not None:
            self.meter.close()


class SiteMemory:
    """Sees the memory of the devices behind a cluster's GPUs; asking the driver takes a millisecond or so."""

    def __init__(self, meter: NvmlMeter) -> None:
        self._meter = meter

    def device_of(self, gpu_id: int) -> int:
        """Return the GPU of this machine that stands behind one of the cluster's."""
        return gpu_id % len(self._meter.gpus)

    def free_bytes(self, device: int) -> Bytes | None:
        """Return what is free on a GPU of this machine; None where its driver does not answer (any more)."""
        try:
            reading: GpuReading = self._meter.read()[device]
        except MaveriqError:
            return None
        return max(0, self._meter.gpus[device].memory_bytes - reading.used_bytes)
