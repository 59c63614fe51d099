"""The engines of a real run on this machine: what the user chose, and the GPUs that they run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from maveriq.domain.cluster import Cluster
from maveriq.domain.gpu_kinds import sheet_of_device
from maveriq.domain.models import ModelSpec
from maveriq.errors import InputError, MaveriqError, UnknownNameError
from maveriq.estimate.cluster_profiles import ClusterProfiles
from maveriq.estimate.estimator import Estimator
from maveriq.exec import gpus
from maveriq.exec.capabilities import SupportedByEngine, engine_facts, installed, max_sequence_tokens, this_machine
from maveriq.exec.device import Device
from maveriq.exec.engine_environments import find_environment
from maveriq.exec.engine_python import EnginePython, check_engine_python, parse_engine_pythons
from maveriq.exec.engines.engine import BACKENDS
from maveriq.exec.gpu_sampling import GpuSampler
from maveriq.exec.gpus import Devices, GpuLostError, NvmlMeter
from maveriq.exec.watchdog import SupervisionSettings
from maveriq.scenario.build import cluster_for
from maveriq.scenario.options import option, with_suggestions
from maveriq.units import Bytes, gib

EMULATED, TRTLLM = "emulated", "trtllm"
LOCAL = "local"
"""The value of `--gpus` that means the GPUs of this machine."""

_ENGINES = "Engines"


@with_suggestions
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The options of `maveriq run` and `maveriq serve` that concern engines.

    Raises:
        InputError: a number out of range, or options that exclude each other.
        UnknownNameError: the backend does not exist.
    """

    backend: str | None = option(
        None, "The engine: emulated, torch, vllm or trtllm.", _ENGINES, choices=("emulated", "torch", "vllm", "trtllm")
    )
    real: bool = option(False, "TensorRT-LLM on GPUs.", _ENGINES)  # noqa: FBT003
    time_scale: float = option(1.0, "Real seconds per second of the run (only emulated engines).", _ENGINES)
    start_timeout_s: float = option(900.0, "Time within which an engine must start.", _ENGINES)
    hang_timeout_s: float = option(30.0, "Heartbeat timeout of an engine.", _ENGINES)
    max_restarts: int = option(5, "Failures in a row after which an engine is not restarted.", _ENGINES)
    engine_python: tuple[str, ...] = option(
        (), "The interpreter that runs an engine, ENGINE=PATH: trtllm=/opt/trtllm/bin/python; repeatable.", _ENGINES
    )

    def __post_init__(self) -> None:
        for name in ("time_scale", "start_timeout_s", "hang_timeout_s"):
            value = getattr(self, name)
            if not 0 < value <= 1e6:  # refuses NaN too
                raise InputError(f"--{name.replace('_', '-')} must be positive and at most 1,000,000, not {value}")
        if self.max_restarts < 1:
            raise InputError(f"--max-restarts must be at least 1, not {self.max_restarts}")
        self._check_backend()
        parse_engine_pythons(self.engine_python)

    def _check_backend(self) -> None:
        if self.real and self.backend not in (None, TRTLLM):
            raise InputError(f"--real means TensorRT-LLM; leave it out to run on {self.backend!r}")
        if self.backend is None and not self.real:
            raise InputError(
                "choose an engine: --backend emulated (processes that take the estimated time, no GPU needed), "
                "torch or vllm, or --real (TensorRT-LLM); maveriq sim needs no engine at all"
            )
        if self.name not in BACKENDS:
            raise UnknownNameError("backend", self.name, BACKENDS)
        if self.time_scale != 1 and self.name != EMULATED:
            raise InputError(f"--time-scale {self.time_scale:g} is for emulated engines: real ones take their own time")

    @property
    def name(self) -> str:
        """The backend."""
        return self.backend or TRTLLM

    def supervision(self) -> SupervisionSettings:
        """Return the timeouts and the restart limit of engines."""
        return SupervisionSettings(
            start_timeout_s=self.start_timeout_s, hang_timeout_s=self.hang_timeout_s, max_restarts=self.max_restarts
        )


def local_cluster(name: str, profiles: ClusterProfiles) -> Cluster:
    """Return the cluster that `--gpus` names; `local` means this machine's GPUs without the memory already in use.

    Raises:
        InputError: not a cluster, no GPU on this machine, or GPUs that the profile was not measured on.
    """
    if name != LOCAL:
        return cluster_for(name, profiles)
    profile = profiles.main
    try:
        cluster = gpus.real_cluster()
    except InputError as error:
        raise InputError(f"--gpus {LOCAL}: {error}") from None
    for gpu in cluster.gpus:
        if not _is_kind(gpu.kind, profile.gpu_kind):
            raise InputError(
                f"--gpus {LOCAL}: GPU {gpu.gpu_id} of this machine is a {gpu.kind}, but profile {profile.name!r} was "
                f"measured on {profile.gpu_kind}; measure one with maveriq profile, and name it with --profile"
            )
    return replace(cluster, gpus=tuple(replace(gpu, kind=profile.gpu_kind) for gpu in cluster.gpus))


def _is_kind(driver_name: str, kind: str) -> bool:
    """Return whether a driver's GPU name ("NVIDIA RTX A6000") is of a kind ("A6000", "RTX-A6000")."""
    sheet = sheet_of_device(driver_name)
    if sheet is not None and sheet.name == kind:
        return True
    name, wanted = ("-".join(text.casefold().split()) for text in (driver_name, kind))
    return f"-{wanted}-" in f"-{name}-"


class LocalMachine:
    """What this machine offers a backend: an interpreter, and GPUs, or the CPU where there are none.

    Emulated engines need no GPU.

    Args:
        backend: the engine.
        engine_pythons: the values of `--engine-python`.

    Raises:
        InputError: the backend cannot start here; the message names what is missing.
    """

    def __init__(self, backend: str, engine_pythons: Sequence[str] = ()) -> None:
        self.backend = backend
        self.meter: NvmlMeter | None = None
        self.python = _engine_python(backend, engine_pythons)
        if backend == EMULATED:
            return
        machine = this_machine()
        missing = installed(backend, machine, self.python).missing
        if missing:
            option_text = "--real (TensorRT-LLM)" if backend == TRTLLM else f"--backend {backend}"
            raise InputError(f"{option_text} cannot run here: {missing}")
        if machine.gpus:
            self.meter = NvmlMeter()

    @property
    def python_path(self) -> Path | None:
        """The interpreter that runs the engine; None for the one of this process."""
        return self.python.path if self.python else None

    def planning(self, base: Estimator) -> Estimator:
        """Return the estimator to plan with: it rejects configurations that the backend does not support."""
        if self.backend == EMULATED:
            return base
        device = Device.CUDA if self.meter else Device.CPU
        slices = self.meter is not None and any(gpu.is_slice for gpu in self.meter.gpus)
        return SupportedByEngine(
            base=base,
            engine=self.backend,
            device=device,
            slices=slices,
            compute_capability=self.compute_capability,
        )

    def engine_tokens(self, model: ModelSpec) -> int | None:
        """Return how many tokens the backend keeps of one sequence of a model; None for no limit of its own."""
        return None if self.backend == EMULATED else max_sequence_tokens(self.backend, model)

    @property
    def compute_capability(self) -> float | None:
        """The least compute capability of the machine's GPUs; None if unknown, or without GPUs."""
        return gpus.least_compute_capability(self.meter.gpus) if self.meter else None

    def devices(self, cluster: Cluster) -> Devices:
        """Return the device behind each GPU of a cluster; GPUs share a device where the machine has fewer.

        Raises:
            InputError: a device has less memory than the cluster's GPUs on it.
        """
        if self.meter is None:
            return Devices()
        machine_gpus = self.meter.gpus
        for index, machine_gpu in enumerate(machine_gpus):
            needed = sum(gpu.capacity_bytes for gpu in cluster.gpus[index :: len(machine_gpus)])
            if needed > machine_gpu.memory_bytes:
                raise InputError(
                    f"cluster {cluster.name!r} has {gib(needed):.1f} GiB where this machine's GPU {index} "
                    f"({machine_gpu.name}) has {gib(machine_gpu.memory_bytes):.1f} GiB; describe the machine's GPUs in "
                    "a file, and name it with --gpus"
                )
        return Devices(uuids=tuple(machine_gpus[gpu.gpu_id % len(machine_gpus)].uuid for gpu in cluster.gpus))

    def memory_probe(self) -> DeviceMemory | None:
        """Return the reader of free GPU memory, None without GPUs."""
        return DeviceMemory(self.meter) if self.meter else None

    def sampler(self, cluster: Cluster) -> GpuSampler | None:
        """Return the sampler of GPU load; None without GPUs, or where GPUs of the cluster share a device."""
        return None if self.meter is None or self.devices(cluster).shared else GpuSampler(self.meter)

    def close(self) -> None:
        """Release the GPU driver."""
        if self.meter is not None:
            self.meter.close()


def _engine_python(backend: str, given: Sequence[str]) -> EnginePython | None:
    """Return the interpreter of a backend, checked; None for the one of this process.

    It is the one that the user named, else that of the environment that `maveriq engines setup` made.

    Raises:
        InputError: it cannot run the engine.
    """
    path = parse_engine_pythons(given).get(backend)
    if path is not None:
        source = f"--engine-python {backend}={path}"
    elif (environment := find_environment(backend)) is not None:
        path = str(environment.path)
        source = f"the environment of {backend} (maveriq engines setup {backend} --replace renews it)"
    else:
        return None
    return check_engine_python(path, engine_facts(backend).packages, source=source)


class DeviceMemory:
    """Reads the free memory of the devices behind a cluster's GPUs; a reading takes about a millisecond."""

    def __init__(self, meter: NvmlMeter) -> None:
        self._meter = meter

    def device_of(self, gpu_id: int) -> int:
        """Return the index of the machine's GPU behind a GPU of the cluster."""
        return gpu_id % len(self._meter.gpus)

    def free_bytes(self, device: int) -> Bytes | None:
        """Return the free memory of a GPU of this machine; None where its driver does not answer.

        Raises:
            GpuLostError: the driver has lost the GPU.
        """
        try:
            reading = self._meter.read_one(device)
        except GpuLostError:
            raise
        except MaveriqError:
            return None
        return max(0, self._meter.gpus[device].memory_bytes - reading.used_bytes)
