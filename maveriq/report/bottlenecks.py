"""What held a run back besides load: GPUs never used, requests that waited beside idle GPUs, and what to change.

A request waits beside idle GPUs while no execution runs on any GPU of its own deployment. Under the one queue of
`fifo` it then waits for a request of another model at the head of the queue (head-of-line blocking).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maveriq.control.queues import QueueDiscipline
from maveriq.domain.deployments import Batching
from maveriq.domain.records import NOT_YET, DeploymentRecord, RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.policy.maveriq import TieBreak
from maveriq.report.formatting import figure, gpu_list, share
from maveriq.scenario.options import Options
from maveriq.units import MICROS_PER_SECOND

Array: TypeAlias = npt.NDArray[Any]

_NOTABLE_MEAN_S, _NOTABLE_SHARE = 0.1, 0.25
_MAX_NAMES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleWait:
    """Requests of an endpoint that waited while the GPUs of their deployment were idle.

    Args:
        endpoint: the name of its model, with the number of the endpoint where several serve that model.
        mean_s: such waiting per request that did not end refused.
        share: such waiting as a share of all waiting of the endpoint.
    """

    endpoint: str
    mean_s: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottlenecks:
    """What held a run back.

    Args:
        unused_gpus: GPUs on which no request ran; () where GPUs were not sampled.
        idle_waits: endpoints with notable waiting beside idle GPUs, the longest first.
        advice: the one change most likely to help, "" where none is likely to.
    """

    unused_gpus: tuple[int, ...] = ()
    idle_waits: tuple[IdleWait, ...] = ()
    advice: str = ""

    def sentences(self) -> Iterator[str]:
        """Yield what was found, a sentence each, and the advice last."""
        if self.unused_gpus:
            plural = "s" if len(self.unused_gpus) > 1 else ""
            yield f"GPU{plural} {gpu_list(self.unused_gpus)} served no request."
        for wait in self.idle_waits[:_MAX_NAMES]:
            yield (
                f"{wait.endpoint} waited {figure(wait.mean_s)} s on average while its own GPUs were idle "
                f"({share(wait.share)} of its waiting)."
            )
        if len(self.idle_waits) > _MAX_NAMES:
            yield f"So did {len(self.idle_waits) - _MAX_NAMES} more, for less."
        if self.advice:
            yield f"Most likely to help: {self.advice}."


def find_bottlenecks(run: RunRecord, options: Options | None, *, keeps_up: bool) -> Bottlenecks:
    """Return what held a run back.

    Args:
        run: its records.
        options: its options as resolved; None where they are unknown, and no option can be advised.
        keeps_up: whether the cluster kept up with the requests; if it did, idle GPUs need no advice.
    """
    unused, waits = _unused_gpus(run), tuple(_notable_waits(run))
    advice = "" if options is None else _advice(run, options, unused, waits, keeps_up=keeps_up)
    return Bottlenecks(unused_gpus=unused, idle_waits=waits, advice=advice)


def _unused_gpus(run: RunRecord) -> tuple[int, ...]:
    table = run.requests
    served = set(np.unique(table.deployment_id[table.start_us != NOT_YET]).tolist())
    used = {gpu for deployment in _placed(run) if deployment.deployment_id in served for gpu in _gpus(deployment)}
    return tuple(sorted({sample.gpu_id for sample in run.gpu_samples} - used))


def _placed(run: RunRecord) -> list[DeploymentRecord]:
    return [deployment for deployment in run.deployments if deployment.plan is not None]


def _gpus(deployment: DeploymentRecord) -> tuple[int, ...]:
    return deployment.plan.gpu_ids if deployment.plan else ()


def _notable_waits(run: RunRecord) -> Iterator[IdleWait]:
    """Yield the endpoints whose requests waited beside idle GPUs for long, the longest mean first."""
    names = _endpoint_names(run)
    waits = (_idle_wait(names[endpoint_id], parts) for endpoint_id, parts in _waits_by_endpoint(run).items())
    notable = [wait for wait in waits if wait.mean_s >= _NOTABLE_MEAN_S and wait.share >= _NOTABLE_SHARE]
    yield from sorted(notable, key=lambda wait: -wait.mean_s)


def _endpoint_names(run: RunRecord) -> dict[int, str]:
    counts = Counter(run.models.values())
    return {
        endpoint_id: model if counts[model] == 1 else f"{model} (endpoint {endpoint_id})"
        for endpoint_id, model in run.models.items()
    }


def _idle_wait(endpoint: str, parts: list[tuple[int, int, int]]) -> IdleWait:
    idle_us, waited_us = (sum(float(part[which]) for part in parts) for which in (0, 1))
    count = sum(part[2] for part in parts)
    return IdleWait(
        endpoint=endpoint,
        mean_s=idle_us / count / MICROS_PER_SECOND,
        share=idle_us / waited_us if waited_us else 0.0,
    )


def _waits_by_endpoint(run: RunRecord) -> dict[int, list[tuple[int, int, int]]]:
    """Return for each endpoint, by deployment, how long requests waited beside idle GPUs and in all, and how many."""
    table = run.requests
    ran = (table.start_us != NOT_YET) & (table.finish_us != NOT_YET)
    by_deployment = {deployment.deployment_id: deployment for deployment in _placed(run)}
    spans = {
        number: _distinct_spans(table.start_us[rows], table.finish_us[rows])
        for number, rows in _rows_by_deployment(table.deployment_id, ran).items()
        if number in by_deployment
    }
    tenants: dict[int, set[int]] = {}
    for number in spans:
        for gpu in _gpus(by_deployment[number]):
            tenants.setdefault(gpu, set()).add(number)
    waits: dict[int, list[tuple[int, int, int]]] = {}
    waiting = table.status != RequestStatus.REFUSED.value
    for number, rows in _rows_by_deployment(table.deployment_id, waiting).items():
        if number not in by_deployment:
            continue
        deployment = by_deployment[number]
        beside = sorted(set().union(*(tenants.get(gpu, set()) for gpu in _gpus(deployment))))
        arrival_us, start_us = table.arrival_us[rows], table.start_us[rows]
        left_us = np.where(start_us != NOT_YET, start_us, run.ended_us)
        left_us = np.maximum(left_us, arrival_us)
        busy = _BusyTime.of([spans[other] for other in beside])
        waited_us = int((left_us - arrival_us).sum())
        idle_us = waited_us - int((busy.until(left_us) - busy.until(arrival_us)).sum())
        waits.setdefault(deployment.endpoint.endpoint_id, []).append((idle_us, waited_us, len(rows)))
    return waits


def _rows_by_deployment(deployment_id: Array, chosen: Array) -> dict[int, Array]:
    """Return the rows of each deployment among the chosen ones."""
    rows = np.flatnonzero(chosen)
    numbers = deployment_id[rows]
    if len(rows) and numbers.max() < 1 << 15:
        numbers = numbers.astype(np.int16)  # which NumPy sorts in linear time
    order = np.argsort(numbers, kind="stable")
    rows, numbers = rows[order], numbers[order]
    first = np.flatnonzero(np.diff(numbers, prepend=-1))
    return dict(zip(numbers[first].tolist(), np.split(rows, first[1:]), strict=True)) if len(rows) else {}


def _distinct_spans(start_us: Array, finish_us: Array) -> Array:
    """Return the executions as rows of start and finish; the requests of a batch share one."""
    spans_us = np.stack((start_us, finish_us), axis=1)
    if (start_us[1:] > start_us[:-1]).all():
        return spans_us
    spans_us = spans_us[np.lexsort((finish_us, start_us))]
    is_new = (spans_us[1:] != spans_us[:-1]).any(axis=1)
    return spans_us[np.concatenate(([True], is_new))]


@dataclass(frozen=True, slots=True)
class _BusyTime:
    """The union of executions, as disjoint spans in order, with the busy time before each."""

    starts_us: Array
    ends_us: Array
    before_us: Array

    @classmethod
    def of(cls, spans: list[Array]) -> _BusyTime:
        if not spans:
            none = np.zeros(0, dtype=np.int64)
            return cls(none, none, none)
        spans_us = np.concatenate(spans)
        spans_us = spans_us[np.argsort(spans_us[:, 0], kind="stable")]
        latest_us = np.maximum.accumulate(spans_us[:, 1])
        opens = np.concatenate(([True], spans_us[1:, 0] > latest_us[:-1]))
        starts_us = spans_us[opens, 0]
        ends_us = latest_us[np.concatenate((np.flatnonzero(opens)[1:] - 1, [len(latest_us) - 1]))]
        lengths_us = ends_us - starts_us
        return cls(starts_us, ends_us, np.cumsum(lengths_us) - lengths_us)

    def until(self, times_us: Array) -> Array:
        """Return the busy time before each of some instants."""
        if not len(self.starts_us):
            return np.zeros(len(times_us), dtype=np.int64)
        at = np.maximum(np.searchsorted(self.starts_us, times_us, side="right") - 1, 0)
        within_us = np.clip(times_us - self.starts_us[at], 0, self.ends_us[at] - self.starts_us[at])
        busy_us: Array = self.before_us[at] + within_us
        return busy_us


def _advice(
    run: RunRecord, options: Options, unused: tuple[int, ...], waits: tuple[IdleWait, ...], *, keeps_up: bool
) -> str:
    if waits and options.queue == QueueDiscipline.FIFO.value:
        return "--queue fifo-per-model: under fifo a request waits for earlier requests of other models"
    if keeps_up:
        return ""
    if all(deployment.endpoint.batching is Batching.CONTINUOUS for deployment in run.deployments):
        return "more replicas: GPUs are unused" if unused else "more GPUs, or a lower rate: every GPU is in use"
    if waits:
        return "a longer --max-wait-s: GPUs are held for requests that have waited longer"
    spreads = (options.policy, options.tie_break) == ("llf", TieBreak.FREE_MEMORY.value)
    if unused and not spreads and _shares_gpus(run):
        return "--policy llf --tie-break free-memory: models share GPUs while others are unused"
    if options.batch_size == 1:
        return "--batch-size 4: requests of a model that wait together run together"
    if unused:
        return "--policy alpaserve, which also places replicas: GPUs are unused"
    return "more GPUs, or a lower rate: every GPU is in use"


def _shares_gpus(run: RunRecord) -> bool:
    """Return whether a GPU holds several deployments."""
    gpus = [gpu for deployment in _placed(run) for gpu in _gpus(deployment)]
    return len(gpus) > len(set(gpus))
