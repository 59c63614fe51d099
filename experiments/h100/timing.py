"""Time work on a device: median and spread of repeated calls, CUDA graphs, and rows of CSV files."""

from __future__ import annotations

import csv
import functools
import importlib
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Repeated timings of one call.

    `seconds` and `mad_seconds` are the median and the median absolute deviation. `synced_seconds` is the median wall
    time of a call that starts on an idle device and is waited for, so it holds the launch of the work too.
    """

    seconds: float
    mad_seconds: float
    synced_seconds: float
    repeats: int


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_eager(call: Callable[[], object], device: torch.device, *, target_s: float, max_repeats: int = 20) -> Timing:
    """Time a call that the host launches kernel by kernel. Each repeat starts on an idle device."""
    first_s = _synced_seconds(call, device)
    repeats = min(max_repeats, max(3, int(target_s / first_s)))
    samples = [_synced_seconds(call, device) for _ in range(repeats)]
    return _timing(samples, samples)


def time_graph(
    graph: torch.cuda.CUDAGraph, device: torch.device, *, target_s: float, calls_in_graph: int = 1
) -> Timing:
    """Time replays of a CUDA graph on the device alone, one behind the other; all times are per captured call."""
    synced = [_synced_seconds(graph.replay, device) / calls_in_graph for _ in range(4)][1:]
    repeats = min(50, max(5, int(target_s / (synced[-1] * calls_in_graph))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize(device)
    samples = [before.elapsed_time(after) / 1e3 / calls_in_graph for before, after in itertools.pairwise(events)]
    return _timing(samples[1:], synced)  # the first replay holds its launch


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    """Return one stream for all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream()


def capture(call: Callable[[], object], *, calls_in_graph: int = 1) -> torch.cuda.CUDAGraph:
    """Capture calls as one CUDA graph, after two warm-up calls on the same stream."""
    stream = _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls_in_graph):
            call()
    return graph


def time_on_device(
    call: Callable[[], object], device: torch.device, *, target_s: float, calls_in_graph: int = 1
) -> Timing:
    """Time a call as a CUDA graph on a GPU, and eagerly on a CPU."""
    if device.type != "cuda":
        return time_eager(call, device, target_s=target_s)
    graph = capture(call, calls_in_graph=calls_in_graph)
    return time_graph(graph, device, target_s=target_s, calls_in_graph=calls_in_graph)


@functools.cache
def _gpu_clock() -> Callable[[], int] | None:
    """Return a function that reads the clock of the first GPU in MHz, or None without NVML."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
    except Exception:  # any fault of NVML leaves the column empty
        return None
    return lambda: int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))


def sm_clock_mhz() -> int | None:
    """Return the clock of the multiprocessors of the first GPU, or None where it cannot be read."""
    read_clock = _gpu_clock()
    return read_clock() if read_clock is not None else None


def append_row(path: Path, row: Any) -> None:
    """Append a dataclass to a CSV file, with a header if the file is new; it is on disk when the call returns."""
    values = asdict(row)
    is_new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(values), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow({name: _cell(value) for name, value in values.items()})


def one_line(error: BaseException) -> str:
    """Return an error as one short line of text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def _cell(value: Any) -> Any:
    return f"{value:.9g}" if isinstance(value, float) else value


def _synced_seconds(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def _timing(samples: list[float], synced: list[float]) -> Timing:
    median = statistics.median(samples)
    return Timing(
        seconds=median,
        mad_seconds=statistics.median(abs(sample - median) for sample in samples),
        synced_seconds=statistics.median(synced),
        repeats=len(samples),
    )
