"""What GPUs held and how long they worked, from the records of a run that did not sample them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maveriq.domain.records import NOT_YET, DeploymentRecord, GpuSample, RequestTable
from maveriq.units import MICROS_PER_SECOND, Bytes, Micros

Array: TypeAlias = npt.NDArray[Any]

_MOST_SAMPLES = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStep:
    """What each GPU holds from an instant on, in the order of GPU ids."""

    since_us: Micros
    used_bytes: Sequence[Bytes]


def gpu_history(
    requests: RequestTable,
    deployments: Sequence[DeploymentRecord],
    *,
    memory: Sequence[MemoryStep],
    ended_us: Micros,
) -> tuple[GpuSample, ...]:
    """Return a sample of each GPU every second, or rarer in a long run, and at the end.

    Args:
        requests: a GPU works from the start to the finish of each request of its deployments.
        deployments: which GPUs they have.
        memory: steps in order of time, the first at 0.
        ended_us: when the run ended.
    """
    every_us = MICROS_PER_SECOND * max(1, -(-ended_us // (MICROS_PER_SECOND * _MOST_SAMPLES)))
    instants_us = np.unique(np.append(np.arange(every_us, ended_us, every_us), ended_us))
    step_at = np.searchsorted([step.since_us for step in memory], instants_us, side="right") - 1
    busy = [_busy_shares(requests, deployments, gpu_id, instants_us) for gpu_id in range(len(memory[0].used_bytes))]
    return tuple(
        GpuSample(
            time_us=time_us, gpu_id=gpu_id, memory_bytes=memory[step].used_bytes[gpu_id], busy_share=float(shares[row])
        )
        for row, (time_us, step) in enumerate(zip(instants_us.tolist(), step_at.tolist(), strict=True))
        for gpu_id, shares in enumerate(busy)
    )


def _busy_shares(
    requests: RequestTable, deployments: Sequence[DeploymentRecord], gpu_id: int, instants_us: Array
) -> Array:
    """Return the share of the time since the last instant in which a GPU worked."""
    mine = [one.deployment_id for one in deployments if one.plan and gpu_id in one.plan.gpu_ids]
    ran = np.isin(requests.deployment_id, mine) & (requests.start_us != NOT_YET) & (requests.finish_us != NOT_YET)
    busy_us = _past(requests.start_us[ran], instants_us) - _past(requests.finish_us[ran], instants_us)
    shares: Array = np.diff(busy_us, prepend=0) / np.diff(instants_us, prepend=0)
    return np.clip(shares, 0.0, 1.0)  # recorded times are rounded, so that neighbours may overlap by some µs


def _past(moments_us: Array, instants_us: Array) -> Array:
    """Return for each instant the sum of the time since those moments that have passed."""
    ordered = np.sort(moments_us)
    count = np.searchsorted(ordered, instants_us, side="right")
    sums: Array = np.concatenate(([0], np.cumsum(ordered)))
    past: Array = count * instants_us - sums[count]
    return past
