"""The placement simulator's inner loop in plain Python: what the compiled one must agree with."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence


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
    clocks = [[0.0] * stages for stages in group_stages]
    for number, (arrival, model, slo) in enumerate(zip(arrival_s, model_index, slo_s, strict=True)):
        mine = hosts[host_start[model] : host_start[model + 1]] if model >= 0 else ()
        if not mine:
            continue
        group = min(mine, key=lambda one: clocks[one][-1])
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
