"""GPUs and memory in use over time, from the samples of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from maveriq.domain.records import GpuSample
from maveriq.units import BYTES_PER_GIB, Micros


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuUse:
    """Use of the whole cluster, means weighted by time.

    GPUs in use are the sum of the GPUs' busy shares between two samples: two GPUs busy half of
    the time are one GPU in use. Memory includes what idle GPUs hold.
    """

    mean_gpus: float
    peak_gpus: float
    mean_memory_gib: float
    peak_memory_gib: float


def gpu_use(samples: Sequence[GpuSample]) -> GpuUse | None:
    """Return the use of the cluster, or None where nothing was sampled."""
    if not samples:
        return None
    times_us, at = np.unique(_times(samples), return_inverse=True)
    busy = np.bincount(at, weights=[sample.busy_share for sample in samples])
    memory = np.bincount(at, weights=[sample.memory_bytes for sample in samples])
    weights = _time_since_last_sample(times_us)
    return GpuUse(
        mean_gpus=float(np.average(busy, weights=weights)),
        peak_gpus=float(busy.max()),
        mean_memory_gib=float(np.average(memory, weights=weights)) / BYTES_PER_GIB,
        peak_memory_gib=float(memory.max()) / BYTES_PER_GIB,
    )


def busiest_gpu(samples: Sequence[GpuSample], *, until_us: Micros) -> tuple[int, float] | None:
    """Return the GPU that was busy longest up to `until_us`, and its share of that time."""
    within = [sample for sample in samples if sample.time_us <= until_us]
    if not within:
        return None
    times_us, at = np.unique(_times(within), return_inverse=True)
    weights = _time_since_last_sample(times_us)
    gpu_ids, which = np.unique([sample.gpu_id for sample in within], return_inverse=True)
    busy_us = np.bincount(which, weights=weights[at] * [sample.busy_share for sample in within])
    longest = int(busy_us.argmax())
    return int(gpu_ids[longest]), float(busy_us[longest] / weights.sum())


def _times(samples: Sequence[GpuSample]) -> npt.NDArray[np.int64]:
    return np.fromiter((sample.time_us for sample in samples), dtype=np.int64, count=len(samples))


def _time_since_last_sample(times_us: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the weight of each instant; all alike where no time passed at all."""
    elapsed = np.diff(times_us, prepend=min(0, int(times_us[0])))
    return elapsed if elapsed.any() else np.ones(len(times_us), dtype=np.int64)
