"""How much longer an engine takes beside which others, recorded and simulated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np
from blind_rows import NeighbourRow

from maveriq.domain.records import NOT_YET, RunRecord

Array = np.ndarray[Any, Any]

_LEAST = 10  # requests whose median says something
_ONE, _SEVERAL = "one GPU", "several GPUs"
_BESIDE = ("1 of one GPU", "2 of one GPU", "3 or more of one GPU", "several GPUs only")


class Neighbours:
    """Medians of service time beside others over those alone, gathered engine by engine."""

    def __init__(self) -> None:
        self._recorded: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
        self._sim: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)

    def add(self, recorded: RunRecord, sim: RunRecord) -> None:
        """Take in a run."""
        for found, record in ((self._recorded, recorded), (self._sim, sim)):
            for engine, beside, ratio, requests in _ratios(record):
                found[engine, beside].append((ratio, requests))

    def rows(self) -> Iterator[NeighbourRow]:
        """Yield what was seen at least once, recorded and simulated."""
        for engine in (_ONE, _SEVERAL):
            for beside in _BESIDE:
                recorded, sim = self._recorded[engine, beside], self._sim[engine, beside]
                if recorded and sim:
                    yield NeighbourRow(
                        engine=engine,
                        beside=beside,
                        engines=len(recorded),
                        requests=sum(requests for _, requests in recorded),
                        recorded_longer=100 * (median(ratio for ratio, _ in recorded) - 1),
                        sim_longer=100 * (median(ratio for ratio, _ in sim) - 1),
                    )


def _ratios(record: RunRecord) -> Iterator[tuple[str, str, float, int]]:
    """Yield kind of engine, what was beside it, how many times longer it took than alone, and in how many requests."""
    table = record.requests
    ran = (table.start_us != NOT_YET) & (table.finish_us != NOT_YET)
    start_us, finish_us, deployment_id = (
        column[ran] for column in (table.start_us, table.finish_us, table.deployment_id)
    )
    kinds = {one.deployment_id: _kind(len(one.plan.gpu_ids)) for one in record.deployments if one.plan}
    middle_us = (start_us + finish_us) // 2
    busy = {one: _busy_at(middle_us, start_us[deployment_id == one], finish_us[deployment_id == one]) for one in kinds}
    for one, kind in kinds.items():
        mine = deployment_id == one
        of_one, of_several = (
            sum((busy[other][mine] for other in kinds if other != one and kinds[other] == of), np.zeros(mine.sum()))
            for of in (_ONE, _SEVERAL)
        )
        service_us = (finish_us - start_us)[mine]
        alone = (of_one == 0) & (of_several == 0)
        wheres = (of_one == 1, of_one == 2, of_one >= 3, (of_one == 0) & (of_several > 0))
        for beside, where in zip(_BESIDE, wheres, strict=True):
            if min(alone.sum(), where.sum()) >= _LEAST:
                ratio = np.median(service_us[where]) / np.median(service_us[alone])
                yield kind, beside, float(ratio), int(where.sum())


def _kind(gpus: int) -> str:
    return _ONE if gpus == 1 else _SEVERAL


def _busy_at(instants_us: Array, start_us: Array, finish_us: Array) -> Array:
    """Return 1 for each instant at which an engine executes, else 0."""
    started = np.searchsorted(np.sort(start_us), instants_us, side="right")
    busy: Array = started - np.searchsorted(np.sort(finish_us), instants_us, side="right")
    return busy
