"""Engines of recorded runs: the service time of every request, and how many co-located engines were busy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maveriq.domain.models import KvType, ModelSpec, WeightType, load_model
from maveriq.domain.parallel import ParallelConfig
from maveriq.domain.records import RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.estimate.calibrated import uses_shared_process
from maveriq.tables import Row, choice, read_csv
from maveriq.units import MICROS_PER_SECOND

Array = np.ndarray[Any, np.dtype[np.float64]]

_CHARACTERS_PER_TOKEN = 4
_PUBLISHED_OUTPUT_TOKENS = 20  # of every request of the published recordings
MAX_CO_LOCATED = 7
"""On eight GPUs; `RecordedEngine.busy_shares` has one column more."""

_DEPLOYMENTS = (
    "run", "model_id", "model", "deploy_s", "deployed", "registered_s", "tp", "pp", "layer_split", "weight_dtype",
    "int8_kv", "gpus", "est_gib_per_gpu", "used_gib_after",
)  # fmt: skip
_SCHEDULED = ("run", "req_id", "model_id", "scheduled_s", "prompt_chars")
_COMPLETED = ("run", "req_id", "model_id", "arrival_s", "latency_s", "service_s")
_UNCONTENDED = 1e-3  # share of a service; shorter contention is ignored


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordedEngine:
    """A deployment of a recorded run and the requests it served, one array element per request.

    `busy_shares[i, k]` is the share of the service time of request i in which k other engines in the
    same host process were busy.
    """

    run: str
    model: ModelSpec
    configuration: ParallelConfig
    gpu_ids: tuple[int, ...]
    prompt_tokens: Array
    output_tokens: Array
    service_s: Array
    busy_shares: Array

    @property
    def uncontended(self) -> np.ndarray[Any, np.dtype[np.bool]]:
        """Boolean mask of the requests without contention."""
        uncontended: np.ndarray[Any, np.dtype[np.bool]] = self.busy_shares[:, 0] > 1 - _UNCONTENDED
        return uncontended


def read_engines(folder: Path) -> list[RecordedEngine]:
    """Read the deployments of a folder of recorded runs that served at least one request.

    Raises:
        InputError: a table is missing or invalid.
    """
    deployed = {
        (row.text("run"), row.text("model_id")): row
        for row in read_csv(folder / "deployments.csv", _DEPLOYMENTS, what="recorded deployments")
        if row.count("deployed")
    }
    characters = _admitted_characters(folder / "scheduled.csv.gz", set(deployed))
    requests: dict[tuple[str, str], list[tuple[float, float, float]]] = defaultdict(list)
    for row in read_csv(folder / "completed.csv.gz", _COMPLETED, what="recorded requests"):
        key = row.text("run"), row.text("model_id")
        tokens = max(1.0, characters[key[0]][row.count("req_id", minimum=1) - 1] / _CHARACTERS_PER_TOKEN)
        finish_s = row.number("arrival_s") + row.number("latency_s")
        requests[key].append((finish_s - row.number("service_s"), finish_s, tokens))
    requests_of = {key: np.array(sorted(rows)) for key, rows in requests.items()}
    configurations = {key: _configuration(row) for key, row in deployed.items()}
    return [
        RecordedEngine(
            run=key[0],
            model=load_model(row.text("model")),
            configuration=configurations[key],
            gpu_ids=tuple(map(int, row.text("gpus").split())),
            prompt_tokens=requests_of[key][:, 2],
            output_tokens=np.full(len(requests_of[key]), float(_PUBLISHED_OUTPUT_TOKENS)),
            service_s=requests_of[key][:, 1] - requests_of[key][:, 0],
            busy_shares=_busy_shares(requests_of[key], list(_co_located_requests(key, configurations, requests_of))),
        )
        for key, row in deployed.items()
        if key in requests_of
    ]


def engines_of(run: str, record: RunRecord) -> list[RecordedEngine]:
    """Return the engines of a run that completed at least one request.

    Engines that batch requests are left out, because their service times are those of whole batches.
    """
    table, plans = (
        record.requests,
        {deployment.deployment_id: deployment.plan for deployment in record.deployments if deployment.plan},
    )
    done = table.status == RequestStatus.COMPLETED.value
    start_s, finish_s = table.start_us / MICROS_PER_SECOND, table.finish_us / MICROS_PER_SECOND
    requests = np.column_stack([start_s, finish_s, table.prompt_tokens, table.output_tokens])
    requests_of = {
        (run, str(deployment_id)): requests[mine]
        for deployment_id in plans
        if (mine := done & (table.deployment_id == deployment_id)).any()
    }
    configurations = {(run, str(deployment_id)): plan.configuration for deployment_id, plan in plans.items()}
    return [
        RecordedEngine(
            run=run,
            model=plan.model,
            configuration=plan.configuration,
            gpu_ids=plan.gpu_ids,
            prompt_tokens=requests_of[key][:, 2],
            output_tokens=requests_of[key][:, 3],
            service_s=requests_of[key][:, 1] - requests_of[key][:, 0],
            busy_shares=_busy_shares(requests_of[key], list(_co_located_requests(key, configurations, requests_of))),
        )
        for deployment_id, plan in plans.items()
        if (key := (run, str(deployment_id))) in requests_of and plan.configuration.batch_size == 1
    ]


def _configuration(row: Row) -> ParallelConfig:
    return ParallelConfig(
        tp=row.count("tp", minimum=1),
        pp=row.count("pp", minimum=1),
        weights=choice(row, "weight_dtype", WeightType),
        kv=KvType.INT8 if row.count("int8_kv") else KvType.NATIVE,
    )


def _admitted_characters(path: Path, deployed: set[tuple[str, str]]) -> dict[str, list[int]]:
    """Return prompt lengths by run in the order of admission, without requests for models never deployed."""
    found: dict[str, list[int]] = defaultdict(list)
    for row in read_csv(path, _SCHEDULED, what="scheduled requests"):
        if (row.text("run"), row.text("model_id")) in deployed:
            found[row.text("run")].append(row.count("prompt_chars"))
    return found


def _co_located_requests(
    key: tuple[str, str],
    configurations: Mapping[tuple[str, str], ParallelConfig],
    requests_of: Mapping[tuple[str, str], Array],
) -> Iterator[Array]:
    """Yield the requests of each other engine in the same process."""
    if uses_shared_process(configurations[key]):
        for other, requests in requests_of.items():
            if other != key and other[0] == key[0] and uses_shared_process(configurations[other]):
                yield requests


def _busy_shares(requests: Array, co_located: Sequence[Array]) -> Array:
    """Return `RecordedEngine.busy_shares`; the first two columns of the requests are start and finish."""
    edges = np.array(
        [(at_s, step) for other in co_located for row in other for at_s, step in ((row[0], 1), (row[1], -1))]
    )
    found = np.zeros((len(requests), MAX_CO_LOCATED + 1))
    if not len(edges):
        found[:, 0] = 1.0
        return found
    edges = edges[np.lexsort((edges[:, 1], edges[:, 0]))]
    count = (
        np.append(0, np.cumsum(edges[:, 1])).astype(int).clip(0, MAX_CO_LOCATED)
    )  # before each edge, and after the last
    for shares, (start_s, finish_s, *_) in zip(found, requests, strict=True):
        first, last = np.searchsorted(edges[:, 0], start_s, "right"), np.searchsorted(edges[:, 0], finish_s, "left")
        lasted_s = np.diff([start_s, *edges[first:last, 0], finish_s])
        shares[:] = np.bincount(count[first : last + 1], lasted_s, minlength=MAX_CO_LOCATED + 1) / lasted_s.sum()
    return found
