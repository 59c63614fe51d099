"""What a profile is measured on: the GPU or the processor, driver and clock, and speeds where no data sheet has them.

A processor has no data sheet here. Its bandwidth and speed are measured in about a second: a product with a vector
reads each weight once, as decoding does, and a product of matrices computes, as prefill does.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from maveriq.domain.gpu_kinds import GpuSheet, Link, NumberFormat, gpu_sheet, sheet_of_device
from maveriq.errors import InputError, MaveriqError
from maveriq.estimate.profile_file import MachineRecord
from maveriq.exec.local_machine import LocalMachine
from maveriq.units import gib

CPU = "cpu"
_CPU_GIB = 4.0
_NOMINAL_GB_S, _NOMINAL_TFLOPS = 5.0, 0.05  # of a core, in values of 16 bits and operations with 32
_LINK_GB_S = 2.0  # between processes
_RANKS = 64
_VALUE_BYTES = 4
_TRIES = 3


def machine_record(local: LocalMachine, *, kind: str | None, memory_gib: float | None) -> MachineRecord:
    """Return what is known of this machine without measuring; on a CPU one process stands for one GPU.

    Raises:
        InputError: no data sheet is known of its GPUs.
    """
    system, cores = f"{platform.system()} {platform.release()}"[:300], os.cpu_count() or 1
    if local.meter is None:
        return MachineRecord(
            kind=kind or CPU,
            memory_gib=memory_gib or _CPU_GIB,
            device=_processor()[:300],
            clock_mhz=_clock_mhz(),
            system=system,
            cores=cores,
            sheet=nominal_sheet(cores, memory_gib or _CPU_GIB),
        )
    gpu = local.meter.gpus[0]
    sheet = gpu_sheet(kind) if kind else sheet_of_device(gpu.name)
    if sheet is None:
        raise InputError(
            f"GPU {gpu.name!r} is of no kind whose data sheet is known; name the one that is most like it with --kind "
            "(maveriq gpus lists them), or measure whole models with -c"
        )
    idle_gib = round(gib(local.meter.read()[0].used_bytes), 3)
    return MachineRecord(
        kind=sheet.name,
        memory_gib=memory_gib or round(gib(gpu.memory_bytes), 3),
        idle_gib=0.0 if memory_gib else idle_gib,
        device=gpu.name[:300],
        driver=local.meter.driver[:300],
        clock_mhz=local.meter.clock_mhz(0),
        system=system,
        cores=cores,
    )


def nominal_sheet(cores: int, memory_gib: float) -> GpuSheet:
    """Return the speeds that a processor of so many cores usually has: what a plan is made by."""
    return _sheet(cores, memory_gib, gb_s=_NOMINAL_GB_S * cores, tflops=_NOMINAL_TFLOPS * cores)


def measured_sheet(cores: int, memory_gib: float) -> GpuSheet:
    """Return the speeds of this processor, measured in about a second."""
    generator = np.random.default_rng(0)
    weights = generator.random((8192, 4096), dtype=np.float32)
    vector = generator.random(4096, dtype=np.float32)
    square = generator.random((1024, 1024), dtype=np.float32)
    read_s = _fastest_s(lambda: weights @ vector)
    computed_s = _fastest_s(lambda: square @ square)
    return _sheet(
        cores,
        memory_gib,
        gb_s=2e-9 * weights.size / read_s,  # physics counts 2 bytes a value
        tflops=2e-12 * square.shape[0] ** 3 / computed_s,
    )


def _fastest_s(work: Callable[[], object]) -> float:
    times = []
    for _ in range(1 + _TRIES):
        started_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - started_s)
    return min(times[1:])


def _sheet(cores: int, memory_gib: float, *, gb_s: float, tflops: float) -> GpuSheet:
    return GpuSheet(
        memory_gib=memory_gib,
        usable_gib=memory_gib,
        bandwidth_gb_s=round(gb_s, 3),
        multiprocessors=cores,
        clock_ghz=1.8,
        tflops={NumberFormat.BFLOAT16: round(tflops, 5)},
        link=Link.PCIE,
        link_gb_s=_LINK_GB_S,
        gpus_per_node=_RANKS,
        power_w=100,
        compute_capability=0.1,
        usd_per_hour=0.1,
        price_source="none",
        source="measured by maveriq profile; bandwidth in values of 16 bits",
        value_bytes=_VALUE_BYTES,
        name=CPU,
    )


@contextlib.contextmanager
def real_time() -> Iterator[None]:
    """Let processes that are started in this block have the cores before all others.

    On a CPU any process that wakes takes a core from an engine, and all its threads wait for the slowest one. Linux
    leaves the others a twentieth of the time (sched_rt_runtime_us).

    Raises:
        MaveriqError: the system does not allow it.
    """
    try:
        before = os.sched_getscheduler(0), os.sched_getparam(0)
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(os.sched_get_priority_min(os.SCHED_FIFO)))
    except (AttributeError, OSError):
        raise MaveriqError("--real-time: this system lets root alone do that, or nobody; leave it out") from None
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def _processor() -> str:
    return _of_processor("model name") or platform.processor() or platform.machine()


def _clock_mhz() -> float:
    try:
        return float(_of_processor("cpu MHz") or 0.0)
    except ValueError:
        return 0.0


def _of_processor(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
