"""The placement simulator's inner loop in plain Python, which the compiled one must agree with."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from typing import Any

import numpy as np


def simulate_requests(
    arrival_s: Sequence[float],
    model_index: Sequence[int],
    slo_s: Sequence[float],
    host_start: Sequence[int],
    hosts: Sequence[int],
    group_stages: Sequence[int],
    group_offset: Sequence[int],
    stage_s: Sequence[float],
    overhead_s: float,
    served: MutableSequence[int],
    dispatched: MutableSequence[int],
    finish_s: MutableSequence[float],
) -> None:
    """Do as `maveriq.policy.alpaserve.kernel.simulate_requests`, with lists."""
    clocks = [[0.0] * stages for stages in group_stages]
    for number, (arrival, model, slo) in enumerate(zip(arrival_s, model_index, slo_s, strict=True)):
        mine = hosts[host_start[model] : host_start[model + 1]] if model >= 0 else ()
        if not mine:
            continue
        group = min(mine, key=lambda host: clocks[host][-1])
        dispatched[group] += 1
        stages = group_stages[group]
        first = group_offset[group] + model * stages
        ends = []
        end = arrival
        for stage in range(stages):
            end = max(end, clocks[group][stage]) + stage_s[first + stage]
            ends.append(end)
        finish = end + overhead_s
        if finish - arrival <= slo:
            clocks[group] = ends
            served[model] += 1
            if finish_s:
                finish_s[number] = finish


def plain_loop(*arguments: Any) -> None:
    """Call `simulate_requests` with the kernel's arrays."""
    *given, served, dispatched, finish_s = arguments
    outputs = [served.tolist(), dispatched.tolist(), finish_s.tolist()]
    lists = [value.tolist() if isinstance(value, np.ndarray) else value for value in given]
    simulate_requests(*lists, *outputs)
    for array, values in zip((served, dispatched, finish_s), outputs, strict=True):
        array[:] = values
