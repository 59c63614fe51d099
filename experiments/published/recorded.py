"""The published recordings of the testbed, read with types: runs, their deployments and requests.

The folder is `testbed/` of the measured data; its README there says how it was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from maveriq.domain.deployment import Configuration, LayerSplit
from maveriq.domain.models import KvType, WeightType
from maveriq.errors import InputError
from maveriq.estimate.cells import choice
from maveriq.tables import Row, read_csv
from maveriq.units import Micros, micros

_RUN_COLUMNS = (
    "run", "policy", "model_set", "intent", "trace", "rate_scale", "slo_scale", "scheduled", "completed",
    "deployments",
)  # fmt: skip
_DEPLOYMENT_COLUMNS = (
    "run", "model_id", "model", "deploy_s", "deployed", "registered_s", "tp", "pp", "layer_split", "weight_dtype",
    "int8_kv", "gpus", "est_gib_per_gpu", "used_gib_after",
)  # fmt: skip
_SCHEDULED_COLUMNS = ("run", "req_id", "model_id", "scheduled_s", "prompt_chars")
_COMPLETED_COLUMNS = ("run", "req_id", "model_id", "arrival_s", "latency_s", "service_s")
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What was deployed, and where. `gib_per_gpu` is the estimate it was placed by, () where none was noted."""

    configuration: Configuration
    layer_split: LayerSplit
    gpu_ids: tuple[int, ...]
    gib_per_gpu: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedDeployment:
    """One deploy command and what came of it.

    `layout` is None where the engine never came up. `registered_us` is None where nothing was
    waiting, since it was inferred from waiting requests. `used_gib_after` is measured, per GPU.
    """

    endpoint_id: int
    model_name: str
    asked_us: Micros
    registered_us: Micros | None
    layout: Layout | None
    used_gib_after: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """One run, with its deploy commands in the order of time."""

    name: str
    policy: str
    model_set: str
    intent: str
    trace: str
    scale: float
    slo_scale: float
    deployments: tuple[RecordedDeployment, ...]

    @property
    def by_maveriq(self) -> bool:
        """Whether MaverIQ chose its configurations, rather than a baseline."""
        return self.policy in ("MaverIQ", "MaverIQ-FP16")

    @property
    def float16_only(self) -> bool:
        """Whether MaverIQ was kept to float16 weights."""
        return self.policy == "MaverIQ-FP16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """The scheduled requests of a run in order of time, a column each."""

    arrival_us: np.ndarray[Any, Any]
    endpoint_id: np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """The completed requests of a run in order of arrival, a column each."""

    arrival_us: np.ndarray[Any, Any]
    endpoint_id: np.ndarray[Any, Any]
    latency_us: np.ndarray[Any, Any]
    service_us: np.ndarray[Any, Any]


def read_runs(testbed: Path) -> tuple[RecordedRun, ...]:
    """Return the recorded runs in the order of their file.

    Raises:
        InputError: a file is missing or is not such a table.
    """
    deployments: dict[str, list[RecordedDeployment]] = {}
    for row in read_csv(testbed / "deployments.csv", _DEPLOYMENT_COLUMNS, what="recorded deployments"):
        deployments.setdefault(row.text("run"), []).append(_deployment(row))
    return tuple(
        RecordedRun(
            name=row.text("run"),
            policy=row.text("policy"),
            model_set=row.text("model_set"),
            intent=row.cells["intent"],  # the baselines have none
            trace=row.text("trace"),
            scale=row.number("rate_scale"),
            slo_scale=row.number("slo_scale"),
            deployments=tuple(sorted(deployments.get(row.text("run"), []), key=lambda one: one.asked_us)),
        )
        for row in read_csv(testbed / "runs.csv", _RUN_COLUMNS, what="recorded runs")
    )


def read_scheduled(testbed: Path) -> Mapping[str, Scheduled]:
    """Return the scheduled requests of each run.

    Raises:
        InputError: the file is missing or is not such a table.
    """
    rows = read_csv(testbed / "scheduled.csv.gz", _SCHEDULED_COLUMNS, what="recorded schedule")
    figures = ((row.text("run"), (micros(row.number("scheduled_s")), row.count("model_id"))) for row in rows)
    return {run: Scheduled(arrival_us=table[:, 0], endpoint_id=table[:, 1]) for run, table in _tables(figures).items()}


def read_completed(testbed: Path) -> Mapping[str, Completed]:
    """Return the completed requests of each run.

    Raises:
        InputError: the file is missing or is not such a table.
    """
    rows = read_csv(testbed / "completed.csv.gz", _COMPLETED_COLUMNS, what="recorded requests")
    figures = ((row.text("run"), _completed(row)) for row in rows)
    return {
        run: Completed(arrival_us=table[:, 0], endpoint_id=table[:, 2], latency_us=table[:, 3], service_us=table[:, 4])
        for run, table in _tables(figures).items()
    }


def _completed(row: Row) -> tuple[int, ...]:
    """Return the figures of a request; the first two are what requests are ordered by."""
    return (
        micros(row.number("arrival_s")),
        row.count("req_id"),
        row.count("model_id"),
        micros(row.number("latency_s")),
        micros(row.number("service_s")),
    )


def _tables(figures: Iterator[tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the figures of each run as a table of integers, in ascending order."""
    by_run: dict[str, list[tuple[int, ...]]] = {}
    for run, row in figures:
        by_run.setdefault(run, []).append(row)
    return {run: np.array(sorted(rows), dtype=np.int64) for run, rows in by_run.items()}


def _deployment(row: Row) -> RecordedDeployment:
    return RecordedDeployment(
        endpoint_id=row.count("model_id", least=1),
        model_name=row.text("model"),
        asked_us=micros(row.number("deploy_s")),
        registered_us=micros(row.number("registered_s")) if row.cells["registered_s"] else None,
        layout=_layout(row) if row.count("deployed") else None,
        used_gib_after=_list(row, "used_gib_after", float),
    )


def _layout(row: Row) -> Layout:
    return Layout(
        configuration=Configuration(
            tp=row.count("tp"),
            pp=row.count("pp"),
            weights=choice(row, "weight_dtype", WeightType),
            kv=KvType.INT8 if row.count("int8_kv") else KvType.NATIVE,
        ),
        layer_split=_list(row, "layer_split", int),
        gpu_ids=_list(row, "gpus", int),
        gib_per_gpu=_list(row, "est_gib_per_gpu", float),
    )


def _list(row: Row, column: str, number: Callable[[str], _Number]) -> tuple[_Number, ...]:
    """Return the numbers of a cell that holds several, with spaces between."""
    try:
        return tuple(map(number, row.cells[column].split()))
    except ValueError:
        raise InputError(f"{row.where}: {column} must be numbers, not {row.cells[column]!r}") from None
