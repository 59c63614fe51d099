"""The metrics of a run, overall and per model: latencies, SLO attainment, goodput, cost, use of GPUs (SPEC 9).

Figures of latency and cost cover completed requests. Shares "over scheduled" count every request
that arrived: a refused, failed or unfinished request misses its SLO. The order of the rows changes
no figure, because values are sorted before they are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from maveriq.domain.deployments import Batching
from maveriq.domain.records import NOT_YET, GpuSample, ItlTable, RequestTable, RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.units import BYTES_PER_GIB, MICROS_PER_SECOND, Micros, gib, micros

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Requests by the status they ended in; `scheduled` is their sum."""

    scheduled: int
    completed: int
    refused: int
    failed: int
    unfinished: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Mean and percentiles (linear interpolation, NumPy's default) of `count` values."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Attainment:
    """Share of the requests with a latency SLO that met it (latency <= SLO).

    `over_completed` is the figure that papers publish; None where none completed.
    `over_scheduled` counts what did not complete as missed.
    """

    over_completed: float | None
    over_scheduled: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Completed requests that meet the TTFT and TPOT SLOs, of all scheduled, and per second.

    A request with no TPOT (under
    two output tokens) cannot miss the SLO on it.
    """

    share: float
    per_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """The metrics of a run, or of one model in it; None where nothing completed or none applies.

    `ttft_s` is first token - arrival, as in the records. `itl_s` is the time between one token of a request and the
    next, over all tokens but the first ones; requests that did not complete are included.
    `cost_gib_s` is latency times the memory of the deployment that served the request.
    `gpu_hours` is service time times GPUs, shared at each instant by the requests that the engine computes
    (those of a batch, or all that run in a continuous engine), and `operational_cost_gpu_hours` the sum of it.
    `throughput_per_s` is completed / (last finish - first arrival). `slo` is None without an SLO.
    `preemptions` counts those of all requests. `cached_share` is the share of prompt tokens, of requests that
    started, which were in the prefix cache; None for engines that do not batch continuously.
    """

    counts: Counts
    latency_s: Figures | None
    queue_s: Figures | None
    service_s: Figures | None
    ttft_s: Figures | None
    tpot_s: Figures | None
    itl_s: Figures | None
    preemptions: int
    cached_share: float | None
    cost_gib_s: Figures | None
    gpu_hours: Figures | None
    slo: Attainment | None
    goodput: Goodput | None
    throughput_per_s: float | None
    operational_cost_gpu_hours: float


METRIC_MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "counts": "requests by the status they ended in",
        "latency_s": "from arrival to the last token",
        "queue_s": "from arrival to the start",
        "service_s": "from the start to the last token",
        "ttft_s": "from arrival to the first token (TTFT)",
        "tpot_s": "time of each output token after the first (TPOT), a mean for each request",
        "itl_s": "time from one token of a request to its next (ITL), over all tokens, of continuous engines",
        "preemptions": "how often continuous engines dropped what was computed of a request",
        "cached_share": "share of prompt tokens, of requests that started, found in the prefix cache",
        "cost_gib_s": "latency x memory of the deployment that served the request",
        "gpu_hours": "service time x GPUs, shared by requests that run together",
        "slo": "share of requests with a latency SLO that met it: of those that completed, and of all",
        "goodput": "requests within `--slo-ttft-ms` and `--slo-tpot-ms`: as a share of all, and per second",
        "throughput_per_s": "completed requests over the time from the first arrival to the last end",
        "operational_cost_gpu_hours": "sum of `gpu_hours`",
    }
)
"""What the fields of `Metrics` are, for docs/reference/metrics.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Metrics of a whole run and of each model, in the order of endpoints.

    Endpoints that serve the same model count as one model. `gpus` is None without GPU samples.
    """

    overall: Metrics
    models: dict[str, Metrics]
    gpus: GpuUse | None
    slo_ttft_s: float | None
    slo_tpot_s: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as plain values for JSON; a figure that does not apply is None."""
        values: dict[str, Any] = msgspec.to_builtins(self)
        return values


def summarise(run: RunRecord, *, slo_ttft_s: float | None = None, slo_tpot_s: float | None = None) -> Summary:
    """Return the summary of a run.

    Args:
        run: the records.
        slo_ttft_s: most seconds from arrival to the first token, for goodput; None for no limit.
        slo_tpot_s: most seconds per output token after the first, for goodput; None for no limit.

    Raises:
        InvariantError: a request has no final status.
    """
    run.requests.counts()
    limits = _GoodputLimits(ttft_s=slo_ttft_s, tpot_s=slo_tpot_s)
    columns = _Columns.of(run)
    by_model = _endpoints_by_model(run)
    models = {
        name: _metrics(columns.where(np.isin(run.requests.endpoint_id, endpoints)), limits, _itl(run.itl, endpoints))
        for name, endpoints in by_model.items()
    }
    return Summary(
        overall=_metrics(columns, limits, _itl(run.itl)),
        models=models,
        gpus=gpu_use(run.gpu_samples),
        slo_ttft_s=slo_ttft_s,
        slo_tpot_s=slo_tpot_s,
    )


def _endpoints_by_model(run: RunRecord) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for endpoint_id, model in sorted(run.models.items()):
        groups.setdefault(model, []).append(endpoint_id)
    return groups


@dataclass(frozen=True, slots=True, kw_only=True)
class _GoodputLimits:
    ttft_s: float | None
    tpot_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """The columns that metrics need, of some requests: read one by one, since of many requests not all fit in memory.

    `gpus` and `memory_gib` are of each deployment, by its number; `gpu_us` is each request's share of the time of its
    deployment's GPUs. `chosen` says which rows count, None for all.
    """

    table: RequestTable
    memory_gib: Array
    gpu_us: Array
    chosen: Array | None = None

    @classmethod
    def of(cls, run: RunRecord) -> _Columns:
        gpus, memory_gib = _deployment_sizes(run)
        return cls(table=run.requests, memory_gib=memory_gib, gpu_us=_gpu_us(run, gpus))

    def where(self, chosen: Array) -> _Columns:
        """Return those requests that are also chosen here."""
        return replace(self, chosen=chosen if self.chosen is None else self.chosen & chosen)

    def __len__(self) -> int:
        return len(self.table) if self.chosen is None else int(self.chosen.sum())

    def column(self, name: str) -> Array:
        """Return a column of the request table."""
        return self._rows(getattr(self.table, name))

    def gpu_time_us(self) -> Array:
        return self._rows(self.gpu_us)

    def deployment_gib(self) -> Array:
        return self.memory_gib[self.column("deployment_id")]

    def _rows(self, values: Array) -> Array:
        return values if self.chosen is None else values[self.chosen]


def _gpu_us(run: RunRecord, gpus: Array) -> Array:
    """Return each request's share of the time of its GPUs.

    Args:
        run: the records.
        gpus: GPUs of each deployment, indexed by its id.
    """
    table = run.requests
    service_us = table.finish_us - table.start_us
    gpu_us: Array = service_us * gpus[table.deployment_id] / _together(table.deployment_id, table.start_us)
    served = (table.start_us != NOT_YET) & (table.finish_us != NOT_YET)
    for deployment in run.deployments:
        if deployment.endpoint.batching is Batching.CONTINUOUS:
            number = deployment.deployment_id
            rows = np.flatnonzero(served & (table.deployment_id == number))
            gpu_us[rows] = gpus[number] * _shares_of_time_us(table.start_us[rows], table.finish_us[rows])
    return gpu_us


def _shares_of_time_us(start_us: Array, finish_us: Array) -> Array:
    """Return how much of the time each request has to itself, if all that run at an instant share it evenly."""
    times_us, at = np.unique(np.concatenate([start_us, finish_us]), return_inverse=True)
    changes = np.zeros(len(times_us), dtype=np.int64)
    np.add.at(changes, at, np.repeat([1, -1], len(start_us)))
    running = np.cumsum(changes)[:-1]
    shares_us = np.where(running > 0, np.diff(times_us) / np.maximum(running, 1), 0.0)
    until_us = np.concatenate([[0.0], np.cumsum(shares_us)])
    starts, ends = np.split(at, 2)
    shared: Array = until_us[ends] - until_us[starts]
    return shared


def _together(deployment_id: Array, start_us: Array) -> Array:
    """Return the size of each request's batch: a deployment starts one execution at an instant."""
    if _differ(deployment_id, start_us):
        return np.ones(len(start_us), dtype=np.int64)
    order = np.lexsort((start_us, deployment_id))
    deployments, starts_us = deployment_id[order], start_us[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (deployments[1:] != deployments[:-1]) | (starts_us[1:] != starts_us[:-1])
    execution = np.cumsum(first) - 1
    together = np.empty(len(order), dtype=np.int64)
    together[order] = np.bincount(execution)[execution]
    return together


def _differ(deployment_id: Array, start_us: Array) -> bool:
    """Return whether no two requests of a deployment started together; one plain sort is faster than by two columns."""
    started = start_us != NOT_YET
    deployments, starts_us = deployment_id[started].astype(np.int64), start_us[started]
    bound = int(starts_us.max(initial=0)) + 1
    if int(deployments.max(initial=0)) * bound >= 1 << 62:
        return False
    ordered = np.sort(deployments * bound + starts_us)
    return not (ordered[1:] == ordered[:-1]).any()


def _deployment_sizes(run: RunRecord) -> tuple[Array, Array]:
    """Return GPUs and memory (GiB) of each deployment, indexed by its id; 0 for "none took it"."""
    last = max([0, *(deployment.deployment_id for deployment in run.deployments)])
    gpus, memory_gib = np.zeros(last + 1, dtype=np.int64), np.zeros(last + 1)
    for deployment in run.deployments:
        if deployment.plan is not None:
            gpus[deployment.deployment_id] = deployment.plan.configuration.gpus
            memory_gib[deployment.deployment_id] = gib(deployment.plan.memory_bytes)
    return gpus, memory_gib


def _metrics(rows: _Columns, limits: _GoodputLimits, itl: ItlTable | None) -> Metrics:
    done = rows.where(rows.table.status == RequestStatus.COMPLETED.value)
    completed = len(done)
    finish_us = done.column("finish_us")
    span_us = int(finish_us.max() - rows.column("arrival_us").min()) if completed else 0
    latency_us = finish_us - done.column("arrival_us")
    ttft_us, tpot_us = _first_token_wait_us(done), _time_per_token_us(done)
    gpu_hours = _figures(done.gpu_time_us(), per=3600 * MICROS_PER_SECOND)
    return Metrics(
        counts=_counts(rows.column("status")),
        latency_s=_figures(latency_us),
        queue_s=_figures(done.column("start_us") - done.column("arrival_us")),
        service_s=_figures(finish_us - done.column("start_us")),
        ttft_s=_figures(ttft_us[~np.isnan(ttft_us)]),
        tpot_s=_figures(tpot_us[~np.isnan(tpot_us)]),
        itl_s=_weighted_figures(itl.itl_us, itl.tokens) if itl is not None else None,
        preemptions=int(rows.column("preemptions").sum()),
        cached_share=_cached_share(rows) if itl is not None else None,
        cost_gib_s=_figures(latency_us * done.deployment_gib()),
        gpu_hours=gpu_hours,
        slo=_attainment(rows, done, latency_us),
        goodput=_goodput(len(rows), ttft_us, tpot_us, limits, span_us),
        throughput_per_s=_per_second(completed, span_us),
        operational_cost_gpu_hours=gpu_hours.mean * gpu_hours.count if gpu_hours else 0.0,
    )


def _counts(status: Array) -> Counts:
    def count(which: RequestStatus) -> int:
        return int((status == which.value).sum())

    return Counts(
        scheduled=len(status),
        completed=count(RequestStatus.COMPLETED),
        refused=count(RequestStatus.REFUSED),
        failed=count(RequestStatus.FAILED),
        unfinished=count(RequestStatus.UNFINISHED),
    )


def _first_token_wait_us(done: _Columns) -> Array:
    """Return first token - arrival of completed requests, NaN where no first token was seen."""
    first_token_us = done.column("first_token_us")
    return np.where(first_token_us != NOT_YET, first_token_us - done.column("arrival_us"), np.nan)


def _time_per_token_us(done: _Columns) -> Array:
    """Return (finish - first token) / (output tokens - 1) of completed requests, NaN under two tokens."""
    output_tokens, first_token_us = done.column("output_tokens"), done.column("first_token_us")
    has_tpot = (output_tokens > 1) & (first_token_us != NOT_YET)
    per_token_us: Array = (done.column("finish_us") - first_token_us) / np.maximum(output_tokens - 1, 1)
    return np.where(has_tpot, per_token_us, np.nan)


def _figures(values: Array, *, per: float = MICROS_PER_SECOND) -> Figures | None:
    """Return the figures of values in units of 1/`per`, by default microseconds to seconds."""
    if not len(values):
        return None
    ordered = np.sort(values)
    mean = ordered.mean() / per
    p50, p95, p99 = np.percentile(ordered, (50, 95, 99), overwrite_input=True) / per
    return Figures(count=len(values), mean=float(mean), p50=float(p50), p95=float(p95), p99=float(p99))


def _itl(itl: ItlTable | None, endpoints: Sequence[int] | None = None) -> ItlTable | None:
    """Return the inter-token latencies of some endpoints, None for all, each latency once."""
    if itl is None:
        return None
    chosen = slice(None) if endpoints is None else np.isin(itl.endpoint_id, endpoints)
    itl_us, at = np.unique(itl.itl_us[chosen], return_inverse=True)
    tokens = np.zeros(len(itl_us), dtype=np.int64)
    np.add.at(tokens, at, itl.tokens[chosen])
    return ItlTable(endpoint_id=np.zeros(len(itl_us), dtype=np.int64), itl_us=itl_us, tokens=tokens)


def _weighted_figures(values: Array, counts: Array, *, per: float = MICROS_PER_SECOND) -> Figures | None:
    """Return the figures of values that occur `counts` times each; values ascend. They are those of `_figures`."""
    ends = np.cumsum(counts)
    if not len(ends):
        return None
    count = int(ends[-1])
    at = np.array((50, 95, 99)) / 100 * (count - 1)
    below = np.floor(at).astype(np.int64)
    low, high = (
        values[np.searchsorted(ends, np.minimum(rank, count - 1), side="right")] for rank in (below, below + 1)
    )
    p50, p95, p99 = (low + (high - low) * (at - below)) / per
    mean = float((values * counts).sum()) / count / per
    return Figures(count=count, mean=mean, p50=float(p50), p95=float(p95), p99=float(p99))


def _cached_share(rows: _Columns) -> float | None:
    started = rows.where(rows.table.start_us != NOT_YET)
    prompt_tokens = int(started.column("prompt_tokens").sum())
    return int(started.column("cached_tokens").sum()) / prompt_tokens if prompt_tokens else None


def _attainment(rows: _Columns, done: _Columns, latency_us: Array) -> Attainment | None:
    scheduled = int((rows.column("slo_us") > 0).sum())
    if not scheduled:
        return None
    slo_us = done.column("slo_us")
    completed = int((slo_us > 0).sum())
    met = int(((slo_us > 0) & (latency_us <= slo_us)).sum())
    return Attainment(over_completed=met / completed if completed else None, over_scheduled=met / scheduled)


def _goodput(scheduled: int, ttft_us: Array, tpot_us: Array, limits: _GoodputLimits, span_us: int) -> Goodput | None:
    if not scheduled or (limits.ttft_s is None and limits.tpot_s is None):
        return None
    good = np.ones(len(tpot_us), dtype=bool)
    if limits.ttft_s is not None:
        good &= ttft_us <= micros(limits.ttft_s)
    if limits.tpot_s is not None:
        good &= ~(tpot_us > limits.tpot_s * MICROS_PER_SECOND)
    count = int(good.sum())
    return Goodput(share=count / scheduled, per_s=_per_second(count, span_us))


def _per_second(count: int, span_us: int) -> float | None:
    return count * MICROS_PER_SECOND / span_us if span_us > 0 else None


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
