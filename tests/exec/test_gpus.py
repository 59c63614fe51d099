"""GPU readings: NVML (a stand-in), virtual GPUs, and samples over time."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from engine_fixtures import run_async, running_executor, until
from fixtures import make_controller
from gpu_fakes import FakeMeter

from maveriq.domain.cluster import LoadWindow
from maveriq.errors import InputError, MaveriqError
from maveriq.exec.gpu_sampling import GpuRecorder, GpuSampler
from maveriq.exec.gpus import (
    GpuIdentity,
    GpuLostError,
    GpuReading,
    NvmlMeter,
    cluster_of,
    least_compute_capability,
    real_cluster,
)
from maveriq.units import BYTES_PER_GIB

GIB = BYTES_PER_GIB


# NVML


class NvmlError(Exception):
    pass


@dataclass
class FakeGpu:
    """A GPU of the stand-in; missing readings raise errors."""

    uuid: str
    name: str | bytes = "NVIDIA A6000"
    total: int = 48 * GIB
    used: int = GIB
    reserved: int = GIB // 2
    percent: int | Exception = 30
    millijoules: int | Exception = 5_000
    capability: tuple[int, int] | None = (8, 6)
    mig: bool = False
    slices: list[FakeGpu | None] = field(default_factory=list)


class FakeNvml(ModuleType):
    """Stands in for pynvml."""

    NVML_DEVICE_MIG_ENABLE = 1
    nvmlMemory_v2 = 2  # noqa: N815

    NVMLError = NvmlError
    NVMLError_LibraryNotFound = type("NVMLError_LibraryNotFound", (NvmlError,), {})
    NVMLError_NotSupported = type("NVMLError_NotSupported", (NvmlError,), {})
    NVMLError_NoPermission = type("NVMLError_NoPermission", (NvmlError,), {})
    NVMLError_NotFound = type("NVMLError_NotFound", (NvmlError,), {})
    NVMLError_FunctionNotFound = type("NVMLError_FunctionNotFound", (NvmlError,), {})
    NVMLError_InvalidArgument = type("NVMLError_InvalidArgument", (NvmlError,), {})
    NVMLError_GpuIsLost = type("NVMLError_GpuIsLost", (NvmlError,), {})
    NVMLError_ResetRequired = type("NVMLError_ResetRequired", (NvmlError,), {})

    def __init__(self, *gpus: FakeGpu) -> None:
        super().__init__("pynvml")
        self.fakes, self.users, self.no_driver, self.old, self.lost = list(gpus), 0, False, False, False

    def nvmlInit(self) -> None:  # noqa: N802
        if self.no_driver:
            raise self.NVMLError_LibraryNotFound("NVML Shared Library Not Found")
        self.users += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.users -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.fakes)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:  # noqa: N802
        return self.fakes[index]

    def nvmlDeviceGetMigMode(self, gpu: FakeGpu) -> list[int]:  # noqa: N802
        if self.old:
            raise self.NVMLError_NotSupported
        return [int(gpu.mig), int(gpu.mig)]

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: FakeGpu) -> int:  # noqa: N802
        return len(gpu.slices)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: FakeGpu, index: int) -> FakeGpu:  # noqa: N802
        found = gpu.slices[index]
        if found is None:
            raise self.NVMLError_NotFound
        return found

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:  # noqa: N802
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> str | bytes:  # noqa: N802
        return gpu.name

    def nvmlDeviceGetCudaComputeCapability(self, gpu: FakeGpu) -> list[int]:  # noqa: N802
        if gpu.capability is None:
            raise self.NVMLError_NotSupported
        return list(gpu.capability)

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu, version: int | None = None) -> Any:  # noqa: N802
        if self.lost:
            raise self.NVMLError_GpuIsLost("GPU is lost")
        if version is None:
            return SimpleNamespace(total=gpu.total, used=gpu.used + gpu.reserved)
        if self.old:
            raise self.NVMLError_FunctionNotFound
        return SimpleNamespace(total=gpu.total, used=gpu.used, reserved=gpu.reserved)

    def nvmlDeviceGetUtilizationRates(self, gpu: FakeGpu) -> Any:  # noqa: N802
        if isinstance(gpu.percent, Exception):
            raise gpu.percent
        return SimpleNamespace(gpu=gpu.percent)

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: FakeGpu) -> int:  # noqa: N802
        if isinstance(gpu.millijoules, Exception):
            raise gpu.millijoules
        return gpu.millijoules


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeNvml]:
    def install(*gpus: FakeGpu) -> FakeNvml:
        fake = FakeNvml(*gpus)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return install


@pytest.mark.parametrize("old", [False, True])
def test_readings_of_real_gpus(nvml: Callable[..., FakeNvml], old: bool) -> None:  # noqa: FBT001
    fake = nvml(
        FakeGpu("GPU-a"), FakeGpu("GPU-b", name=b"T4", total=16 * GIB, percent=0, millijoules=7, capability=(7, 5))
    )
    fake.old = old
    meter = NvmlMeter()
    assert meter.gpus == (
        GpuIdentity(uuid="GPU-a", name="NVIDIA A6000", memory_bytes=48 * GIB, compute_capability=8.6),
        GpuIdentity(uuid="GPU-b", name="T4", memory_bytes=16 * GIB, compute_capability=7.5),
    )
    assert least_compute_capability(meter.gpus) == 7.5
    # Memory reserved by the driver counts as used, with old drivers too.
    assert meter.read() == (
        GpuReading(used_bytes=GIB + GIB // 2, busy_share=0.3, energy_j=5.0),
        GpuReading(used_bytes=GIB + GIB // 2, busy_share=0.0, energy_j=0.007),
    )
    meter.close()
    meter.close()
    assert fake.users == 0


def test_the_least_generation_is_unknown_where_one_is(nvml: Callable[..., FakeNvml]) -> None:
    nvml(FakeGpu("GPU-a", capability=(12, 0)), FakeGpu("GPU-b", capability=None))
    known, unknown = NvmlMeter().gpus
    assert (known.compute_capability, unknown.compute_capability) == (12.0, None)
    assert least_compute_capability((known,)) == 12.0
    assert least_compute_capability((known, unknown)) is None
    assert least_compute_capability(()) is None


def test_missing_gpu_readings_are_none(nvml: Callable[..., FakeNvml]) -> None:
    fake = FakeNvml
    nvml(FakeGpu("GPU-a", percent=fake.NVMLError_NoPermission(), millijoules=fake.NVMLError_NotSupported()))
    assert NvmlMeter().read() == (GpuReading(used_bytes=GIB + GIB // 2),)


def test_mig_slices_replace_their_gpu(nvml: Callable[..., FakeNvml]) -> None:
    unsupported = FakeNvml.NVMLError_NotSupported()
    slices = [FakeGpu(f"MIG-{k}", total=12 * GIB, percent=unsupported, millijoules=unsupported) for k in range(2)]
    nvml(FakeGpu("GPU-a"), FakeGpu("GPU-b", mig=True, slices=[slices[0], None, slices[1]]))
    gpus = NvmlMeter().gpus
    assert [(gpu.uuid, gpu.is_slice) for gpu in gpus] == [("GPU-a", False), ("MIG-0", True), ("MIG-1", True)]


def test_the_local_cluster_counts_used_memory(nvml: Callable[..., FakeNvml]) -> None:
    fake = nvml(FakeGpu("GPU-a"), FakeGpu("GPU-b", used=10 * GIB, reserved=0))
    cluster = real_cluster()
    assert [(gpu.gpu_id, gpu.node, gpu.kind) for gpu in cluster.gpus] == [
        (0, 0, "NVIDIA A6000"),
        (1, 0, "NVIDIA A6000"),
    ]
    assert [gpu.capacity_bytes for gpu in cluster.gpus] == [48 * GIB] * 2
    assert [gpu.idle_bytes for gpu in cluster.gpus] == [GIB + GIB // 2, 10 * GIB]
    assert fake.users == 0


@pytest.mark.parametrize(
    ("state", "message"),
    [("no driver", "no NVIDIA driver"), ("no gpu", "knows no GPU"), ("lost", "GPU is lost"), ("no package", "maveriq")],
)
def test_without_gpus_the_error_is_one_line(
    nvml: Callable[..., FakeNvml], monkeypatch: pytest.MonkeyPatch, state: str, message: str
) -> None:
    fake = nvml(*([] if state == "no gpu" else [FakeGpu("GPU-a")]))
    fake.no_driver, fake.lost = state == "no driver", state == "lost"
    if state == "no package":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(InputError, match=message):
        NvmlMeter()
    assert fake.users == 0


def test_a_gpu_lost_later_is_a_failure_not_an_input_error(nvml: Callable[..., FakeNvml]) -> None:
    fake = nvml(FakeGpu("GPU-a"))
    meter = NvmlMeter()
    fake.lost = True
    with pytest.raises(GpuLostError, match=r"GPU 0 of this machine \(NVIDIA A6000\) is lost: GPU is lost") as failed:
        meter.read()
    assert not isinstance(failed.value, InputError)


def test_one_lost_gpu_hides_no_other(nvml: Callable[..., FakeNvml]) -> None:
    fake = nvml(FakeGpu("GPU-a"), FakeGpu("GPU-b"))
    meter = NvmlMeter()
    fake.fakes[0].percent = FakeNvml.NVMLError_ResetRequired("GPU requires reset")
    with pytest.raises(GpuLostError, match="GPU requires reset"):
        meter.read_one(0)
    assert meter.read_one(1).used_bytes == GIB + GIB // 2


# Virtual GPUs


def test_a_virtual_cluster() -> None:
    cluster = cluster_of(FakeMeter([8 * GIB, 4 * GIB]), name="virtual")
    assert [(gpu.capacity_bytes, gpu.idle_bytes) for gpu in cluster.gpus] == [(8 * GIB, 0), (4 * GIB, 0)]


# Over time


class Scripted:
    """A meter that returns given readings in turn, and repeats the last one."""

    def __init__(self, *readings: Sequence[GpuReading], slow: bool = False) -> None:
        self.readings, self.slow, self.threads = list(readings), slow, set[int]()
        self.gpus = [GpuIdentity(uuid=f"GPU-{k}", name="x", memory_bytes=48 * GIB) for k in range(len(readings[0]))]

    def read(self) -> Sequence[GpuReading]:
        self.threads.add(threading.get_ident())
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]

    def close(self) -> None:
        pass


def reading(used_gib: float = 0, busy: float | None = 0.0, energy_j: float | None = None) -> GpuReading:
    return GpuReading(used_bytes=round(used_gib * GIB), busy_share=busy, energy_j=energy_j)


def test_load_is_the_busy_share_of_the_samples_in_the_window() -> None:
    sampler = GpuSampler(Scripted([reading(), reading()]), LoadWindow(samples=4))
    assert sampler.loads() == [0.0, 0.0]
    for busy in (0.5, 0.01, 0.02):  # idle at the threshold
        sampler.add([reading(busy=busy), reading(busy=None)])
    assert sampler.loads() == [0.5, 0.0]
    for _ in range(3):
        sampler.add([reading(busy=0.0), reading(busy=1.0)])
    assert sampler.loads() == [0.25, 0.75]


@pytest.mark.parametrize("slow", [False, True])
def test_sampling_keeps_its_interval_and_does_not_block_the_event_loop(slow: bool) -> None:  # noqa: FBT001
    meter = Scripted([reading()], slow=slow)

    async def some_time() -> None:
        sampler = GpuSampler(meter, LoadWindow(sample_us=10_000, look_us=10_000, samples=100))
        started_s = time.monotonic()
        task = asyncio.create_task(sampler.run())
        await until(lambda: len(sampler._recent) > 5)
        most = (time.monotonic() - started_s) / 0.01 + 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert len(sampler._recent) <= most

    asyncio.run(some_time())
    assert (threading.get_ident() in meter.threads) == (not slow)


def test_placement_sees_how_busy_real_gpus_are(tmp_path) -> None:
    class Lost(Scripted):
        def read(self) -> Sequence[GpuReading]:
            if len(self.readings) == 1:
                raise MaveriqError("GPU 0 (x) does not answer: it is lost")
            return super().read()

    busy = [reading(busy=1.0), *[reading(busy=0.0)] * 7]

    async def check() -> None:
        sampler = GpuSampler(Lost(busy, busy, busy), LoadWindow(sample_us=10_000, look_us=10_000, samples=100))
        async with running_executor({1: [(0,)]}, tmp_path, sampler=sampler) as executor:
            sampling = asyncio.create_task(sampler.run())
            await until(lambda: executor.controller.manager.loads(executor.now_us) == [0.02, 0.0, 0.0, 0.0])
            sampling.cancel()

    run_async(check)


def test_a_lost_gpu_ends_its_measurements_but_not_the_run() -> None:
    class Lost(Scripted):
        def read(self) -> Sequence[GpuReading]:
            if len(self.readings) == 1:
                raise MaveriqError("GPU 0 (x) does not answer: it is lost")
            return super().read()

    meter = Lost([reading(1, energy_j=5.0)], [reading(2, energy_j=8.0)], [reading(3)])

    async def some_time() -> GpuRecorder:
        record = GpuRecorder(make_controller({1: [(0,)]}).manager, 1, meter, own_devices=True)
        for time_us in (1, 2, 3):
            await record.read()
            record.sample(time_us)
            if time_us == 2:
                assert record.energy_j() == (3.0,)
        return record

    record = asyncio.run(some_time())
    assert [sample.memory_bytes for sample in record.samples] == [GIB, 2 * GIB, 0]
    assert record.energy_j() == ()
    assert len(record.notes) == 1
