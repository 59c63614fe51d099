"""The placement simulator's inner loop, compiled with numba. Import it late: compiling takes a second."""

from __future__ import annotations

from typing import Any

import numpy as np

from maveriq.compiling import compiled


@compiled
def simulate_requests(
    arrival_s: np.ndarray[Any, Any],
    model_index: np.ndarray[Any, Any],
    slo_s: np.ndarray[Any, Any],
    host_start: np.ndarray[Any, Any],
    hosts: np.ndarray[Any, Any],
    group_stages: np.ndarray[Any, Any],
    group_offset: np.ndarray[Any, Any],
    stage_s: np.ndarray[Any, Any],
    overhead_s: float,
    served: np.ndarray[Any, Any],
    dispatched: np.ndarray[Any, Any],
    finish_s: np.ndarray[Any, Any],
) -> None:
    """Serve requests in the order of arrival, each within its SLO or not at all.

    A request goes to the group of its model whose last stage is free first, the first such group
    on a tie. It passes the stages one after the other, FIFO on each; where it would then miss its
    SLO it is dropped at its arrival and leaves no trace but in `dispatched`.

    Args:
        arrival_s: of each request, not decreasing.
        model_index: of each request; -1 is unknown and fails.
        slo_s: of each request.
        host_start: where the groups of each model start in `hosts`; one more entry than models.
        hosts: groups that host a model, ascending, one model after the other.
        group_stages: pipeline stages of each group.
        group_offset: where the table of a group starts in `stage_s`.
        stage_s: model m takes `stage_s[offset + m * stages + k]` seconds on stage k.
        overhead_s: added to every request at its end, charged to no GPU.
        served: written: requests served, per model.
        dispatched: written: requests sent to each group, dropped ones included.
        finish_s: written where a request is served: its end; nothing is written if empty.
    """
    groups = len(group_stages)
    max_stages = 1
    for group in range(groups):
        max_stages = max(max_stages, group_stages[group])
    clocks = np.zeros((groups, max_stages))
    last = np.zeros(groups)  # the clock of each last stage again, close together for the dispatch
    ends = np.empty(max_stages)
    keep = len(finish_s) > 0
    for number in range(len(arrival_s)):
        arrival = arrival_s[number]
        model = model_index[number]
        if model < 0 or host_start[model] == host_start[model + 1]:
            continue
        group = hosts[host_start[model]]
        minimum = last[group]
        for position in range(host_start[model] + 1, host_start[model + 1]):
            other = hosts[position]
            if last[other] < minimum:
                minimum = last[other]
                group = other
        dispatched[group] += 1
        stages = group_stages[group]
        first = group_offset[group] + model * stages
        end = arrival
        for stage in range(stages):
            end = max(end, clocks[group, stage]) + stage_s[first + stage]
            ends[stage] = end
        finish = end + overhead_s
        if finish - arrival <= slo_s[number]:
            for stage in range(stages):
                clocks[group, stage] = ends[stage]
            last[group] = end
            served[model] += 1
            if keep:
                finish_s[number] = finish
