"""How much other busy engines slow an engine down, recorded and simulated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np
from blind_rows import ContentionRow

from maveriq.domain.records import NOT_YET, RunRecord

Array = np.ndarray[Any, Any]

_MIN_REQUESTS = 10  # fewer requests give no meaningful median
_ONE, _SEVERAL = "one GPU", "several GPUs"
_CO_LOCATED = ("1 of one GPU", "2 of one GPU", "3 or more of one GPU", "several GPUs only")


class Contention:
    """Collects, for each engine, ratios of median service times: with other busy engines over without."""

    def __init__(self) -> None:
        self._recorded: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
        self._sim: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)

    def add(self, recorded: RunRecord, sim: RunRecord) -> None:
        """Add a run."""
        for found, record in ((self._recorded, recorded), (self._sim, sim)):
            for engine, co_located, ratio, requests in _ratios(record):
                found[engine, co_located].append((ratio, requests))

    def rows(self) -> Iterator[ContentionRow]:
        """Yield a row for each situation that both recordings and simulations contain."""
        for engine in (_ONE, _SEVERAL):
            for co_located in _CO_LOCATED:
                recorded, sim = self._recorded[engine, co_located], self._sim[engine, co_located]
                if recorded and sim:
                    yield ContentionRow(
                        engine=engine,
                        co_located=co_located,
                        engines=len(recorded),
                        requests=sum(requests for _, requests in recorded),
                        recorded_longer=100 * (median(ratio for ratio, _ in recorded) - 1),
                        sim_longer=100 * (median(ratio for ratio, _ in sim) - 1),
                    )


def _ratios(record: RunRecord) -> Iterator[tuple[str, str, float, int]]:
    """Yield kind of engine, other busy engines, ratio of median service times to those alone, and count of requests."""
    table = record.requests
    ran = (table.start_us != NOT_YET) & (table.finish_us != NOT_YET)
    start_us, finish_us, deployment_id = (
        column[ran] for column in (table.start_us, table.finish_us, table.deployment_id)
    )
    kinds = {
        deployment.deployment_id: _kind(len(deployment.plan.gpu_ids))
        for deployment in record.deployments
        if deployment.plan
    }
    middle_us = (start_us + finish_us) // 2
    busy = {
        engine: _busy_at(middle_us, start_us[deployment_id == engine], finish_us[deployment_id == engine])
        for engine in kinds
    }
    for engine, kind in kinds.items():
        mine = deployment_id == engine
        of_one, of_several = (
            sum((busy[other][mine] for other in kinds if other != engine and kinds[other] == of), np.zeros(mine.sum()))
            for of in (_ONE, _SEVERAL)
        )
        service_us = (finish_us - start_us)[mine]
        alone = (of_one == 0) & (of_several == 0)
        wheres = (of_one == 1, of_one == 2, of_one >= 3, (of_one == 0) & (of_several > 0))
        for co_located, where in zip(_CO_LOCATED, wheres, strict=True):
            if min(alone.sum(), where.sum()) >= _MIN_REQUESTS:
                ratio = np.median(service_us[where]) / np.median(service_us[alone])
                yield kind, co_located, float(ratio), int(where.sum())


def _kind(gpus: int) -> str:
    return _ONE if gpus == 1 else _SEVERAL


def _busy_at(instants_us: Array, start_us: Array, finish_us: Array) -> Array:
    """Return 1 for each instant at which an engine executes, else 0."""
    started = np.searchsorted(np.sort(start_us), instants_us, side="right")
    busy: Array = started - np.searchsorted(np.sort(finish_us), instants_us, side="right")
    return busy
