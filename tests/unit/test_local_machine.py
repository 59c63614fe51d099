"""The local machine: GPUs for engines, one or several per device, or none."""

from dataclasses import replace

import pytest
from fixtures import MODEL, TokenSeconds, cluster
from gpu_fakes import FakeMeter

from maveriq.domain.models import KvType, WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError, MaveriqError
from maveriq.exec import local_machine
from maveriq.exec.capabilities import Installed, Machine
from maveriq.exec.gpus import GpuLostError
from maveriq.exec.local_machine import LocalMachine
from maveriq.units import BYTES_PER_GIB


def machine(
    monkeypatch: pytest.MonkeyPatch,
    *gib: int,
    missing: str | None = None,
    is_slice: bool = False,
    compute_capability: float | None = None,
) -> None:
    """Give the machine GPUs with these sizes of memory."""
    meter = FakeMeter(memory_bytes=[memory_gib * BYTES_PER_GIB for memory_gib in gib], kind="big")
    found = tuple(replace(gpu, is_slice=is_slice, compute_capability=compute_capability) for gpu in meter.gpus)
    monkeypatch.setattr(FakeMeter, "gpus", found)
    monkeypatch.setattr(local_machine, "this_machine", lambda: Machine(gpus=meter.gpus))
    monkeypatch.setattr(local_machine, "installed", lambda _engine, _machine, _python: Installed(missing=missing))
    monkeypatch.setattr(local_machine, "NvmlMeter", lambda: meter)


def test_emulated_engines_have_no_devices() -> None:
    site = LocalMachine("emulated")
    assert (site.meter, site.memory_probe(), site.devices(cluster(4)).uuids) == (None, None, ())
    assert site.sampler(cluster(4)) is None


def test_each_gpu_of_a_cluster_is_a_gpu_of_the_machine(monkeypatch) -> None:
    machine(monkeypatch, 16, 16, 16)
    site = LocalMachine("torch")
    assert site.devices(cluster(2, gib=8)).uuids == ("VIRTUAL-0", "VIRTUAL-1")
    watch = site.memory_probe()
    assert watch is not None
    assert [watch.device_of(gpu_id) for gpu_id in range(4)] == [0, 1, 2, 0]
    assert watch.free_bytes(1) == 16 * BYTES_PER_GIB


def test_a_driver_that_stops_answering_does_not_end_the_run(monkeypatch) -> None:
    machine(monkeypatch, 16)
    site = LocalMachine("torch")
    watch = site.memory_probe()
    assert watch is not None

    def unanswered(_: object) -> None:
        raise MaveriqError("GPU 0 (big) does not answer: timeout")

    monkeypatch.setattr(FakeMeter, "read", unanswered)
    assert watch.free_bytes(0) is None


def test_a_lost_gpu_differs_from_a_driver_that_does_not_answer(monkeypatch) -> None:
    machine(monkeypatch, 16)
    watch = LocalMachine("torch").memory_probe()
    assert watch is not None

    def lost(_: object) -> None:
        raise GpuLostError("GPU 0 of this machine (big) is lost")

    monkeypatch.setattr(FakeMeter, "read", lost)
    with pytest.raises(GpuLostError):
        watch.free_bytes(0)


def test_several_gpus_of_a_cluster_share_a_large_gpu(monkeypatch) -> None:
    machine(monkeypatch, 32)
    site = LocalMachine("torch")
    assert site.devices(cluster(4, gib=8)).uuids == ("VIRTUAL-0",) * 4
    assert site.sampler(cluster(4, gib=8)) is None  # the load of a shared device cannot be attributed
    assert site.sampler(cluster(1, gib=8)) is not None
    with pytest.raises(InputError, match=r"40\.0 GiB .* GPU 0 \(big\) has 32\.0 GiB"):
        site.devices(cluster(5, gib=8))


def test_missing_requirements_are_named(monkeypatch) -> None:
    machine(monkeypatch, missing="not installed: vllm")
    with pytest.raises(InputError, match="--backend vllm cannot run here: not installed: vllm"):
        LocalMachine("vllm")


def test_planning_excludes_what_the_backend_does_not_support(monkeypatch) -> None:
    machine(monkeypatch, 32)
    estimator = TokenSeconds()
    gptq = ParallelConfig(tp=1, pp=1, weights=WeightType.INT4_GPTQ, kv=KvType.NATIVE)
    assert LocalMachine("emulated").planning(estimator) is estimator
    assert estimator.why_not(MODEL, gptq) is None
    two, single = (ParallelConfig(tp=tp, pp=1, weights=WeightType.FLOAT16) for tp in (2, 1))
    assert LocalMachine("torch").planning(estimator).why_not(MODEL, two) is None
    machine(monkeypatch, 32, 32, is_slice=True)
    assert "slices" in (LocalMachine("torch").planning(estimator).why_not(MODEL, two) or "")
    assert LocalMachine("torch").planning(estimator).why_not(MODEL, single) is None
    fp8 = ParallelConfig(tp=1, pp=1, weights=WeightType.FP8)
    for compute_capability, refused in ((8.6, True), (8.9, False), (None, False)):
        machine(monkeypatch, 32, compute_capability=compute_capability)
        reason = LocalMachine("vllm").planning(estimator).why_not(MODEL, fp8)
        assert (reason is not None and "compute capability 8.9, not 8.6" in reason) == refused
    assert (LocalMachine("trtllm").planning(estimator).why_not(MODEL, gptq) or "").startswith("trtllm: ")
