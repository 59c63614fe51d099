"""Reads the published recordings of the testbed: runs, their deployments and requests.

The folder is `testbed/` of the measured data; its README explains how the runs were recorded.
Readers that take `runs` skip the rows of other runs, which is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from maveriq.domain.models import KvType, WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError, UnknownNameError
from maveriq.files import exists, measured_data_path
from maveriq.tables import Row, choice, read_csv
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

TESTBED_GPUS = 8
_MAX_S = 1e9  # thirty years
_MAX_GIB, _MAX_SCALE, _MAX_LAYERS = 1e6, 1e6, 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedPlan:
    """A deployed configuration and its GPUs. `gib_per_gpu` is the estimate used for placement, () if not recorded."""

    configuration: ParallelConfig
    gpu_ids: tuple[int, ...]
    gib_per_gpu: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedDeployment:
    """One deploy command and its result.

    `plan` is None if the engine never started. `registered_us` was inferred from waiting requests,
    and is None if no request waited. `used_gib_after` is the measured memory of each GPU.
    """

    endpoint_id: int
    model_name: str
    requested_us: Micros
    registered_us: Micros | None
    plan: RecordedPlan | None
    used_gib_after: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """One run, with its deploy commands in order of time."""

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
        """Whether MaverIQ was restricted to float16 weights."""
        return self.policy == "MaverIQ-FP16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """The scheduled requests of a run in order of time, as columns."""

    arrival_us: np.ndarray[Any, Any]
    request_id: np.ndarray[Any, Any]
    endpoint_id: np.ndarray[Any, Any]
    prompt_chars: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.request_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """The completed requests of a run in order of arrival, as columns.

    `admitted_id` numbers the requests that were not dropped on arrival, from 1 in order of the schedule.
    """

    arrival_us: np.ndarray[Any, Any]
    admitted_id: np.ndarray[Any, Any]
    endpoint_id: np.ndarray[Any, Any]
    latency_us: np.ndarray[Any, Any]
    service_us: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.admitted_id)


def find_testbed(data: Path | None) -> Path:
    """Return the folder of the recordings.

    Args:
        data: the folder of measured data, or of the recordings; None for `measured_data_path()`.

    Raises:
        InputError: the folder has no recordings.
    """
    folder = measured_data_path() if data is None else data
    if folder is None:
        raise InputError("the measured data is absent; name its folder with --data or MAVERIQ_DATA")
    for testbed in (folder / "testbed", folder):
        if exists(testbed / "runs.csv"):
            return testbed
    raise InputError(f"folder {str(folder)!r} holds no recordings (no testbed/runs.csv); name another one")


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
            name=_run_name(row),
            policy=row.text("policy"),
            model_set=row.text("model_set"),
            intent=row.cells["intent"],  # the baselines have none
            trace=row.text("trace"),
            scale=row.number("rate_scale", minimum=0, maximum=_MAX_SCALE),
            slo_scale=row.number("slo_scale", minimum=0, maximum=_MAX_SCALE),
            deployments=tuple(
                sorted(deployments.get(row.text("run"), []), key=lambda deployment: deployment.requested_us)
            ),
        )
        for row in read_csv(testbed / "runs.csv", _RUN_COLUMNS, what="recorded runs")
    )


def pick_runs(runs: Collection[RecordedRun], names: Collection[str], *, hint: str = "") -> list[RecordedRun]:
    """Return the runs of these names, each once, in the order of the names.

    Args:
        runs: all runs.
        names: names of the runs to return.
        hint: alternatives to a run name, for messages.

    Raises:
        UnknownNameError: there is no such run.
    """
    by_name = {run.name: run for run in runs}
    for name in names:
        if name not in by_name:
            raise UnknownNameError("recorded run", name, by_name, hint)
    return [by_name[name] for name in dict.fromkeys(names)]


def read_requests(testbed: Path, runs: Collection[str]) -> tuple[Mapping[str, Scheduled], Mapping[str, Completed]]:
    """Return the scheduled and the completed requests of each of these runs.

    Raises:
        InputError: a file is missing or is not such a table, or a run has none of either.
    """
    scheduled, completed = read_scheduled(testbed, runs), read_completed(testbed, runs)
    for name in sorted(set(runs) - (scheduled.keys() & completed.keys())):
        raise InputError(f"recorded run {name!r} has no scheduled or no completed requests in {str(testbed)!r}")
    return scheduled, completed


def read_scheduled(testbed: Path, runs: Collection[str] | None = None) -> Mapping[str, Scheduled]:
    """Return the scheduled requests of each run.

    Raises:
        InputError: the file is missing or is not such a table.
    """
    rows = read_csv(testbed / "scheduled.csv.gz", _SCHEDULED_COLUMNS, what="recorded schedule")
    return {
        run: Scheduled(**dict(zip(Scheduled.__slots__, table.T, strict=True)))
        for run, table in _tables(rows, _scheduled, runs).items()
    }


def read_completed(testbed: Path, runs: Collection[str] | None = None) -> Mapping[str, Completed]:
    """Return the completed requests of each run.

    Raises:
        InputError: the file is missing or is not such a table.
    """
    rows = read_csv(testbed / "completed.csv.gz", _COMPLETED_COLUMNS, what="recorded requests")
    return {
        run: Completed(**dict(zip(Completed.__slots__, table.T, strict=True)))
        for run, table in _tables(rows, _completed, runs).items()
    }


def _scheduled(row: Row) -> tuple[int, ...]:
    """Return the fields of `Scheduled`; requests are sorted by the first two."""
    return (
        _time_us(row, "scheduled_s"),
        row.count("req_id", minimum=1),
        row.count("model_id", minimum=1),
        row.count("prompt_chars"),
    )


def _completed(row: Row) -> tuple[int, ...]:
    """Return the fields of `Completed`; requests are sorted by the first two."""
    return (
        _time_us(row, "arrival_s"),
        row.count("req_id", minimum=1),
        row.count("model_id", minimum=1),
        _time_us(row, "latency_s"),
        _time_us(row, "service_s", minimum=1e-6),
    )


def _tables(
    rows: Iterator[Row], figures: Callable[[Row], tuple[int, ...]], runs: Collection[str] | None
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the figures of each run as a table of integers, in ascending order."""
    by_run: dict[str, list[tuple[int, ...]]] = {}
    for row in rows:
        run = row.text("run")
        if runs is None or run in runs:
            by_run.setdefault(run, []).append(figures(row))
    return {run: np.array(sorted(found), dtype=np.int64) for run, found in by_run.items()}


def _time_us(row: Row, column: str, *, minimum: float = 0.0) -> Micros:
    return micros(row.number(column, minimum=minimum, maximum=_MAX_S))


def _run_name(row: Row) -> str:
    name = row.text("run")
    if Path(name).name != name:
        raise InputError(f"{row.where}: run must be a name that a folder can have, not {name!r}")
    return name


def _deployment(row: Row) -> RecordedDeployment:
    used_gib_after = _list(row, "used_gib_after", float, maximum=_MAX_GIB)
    if len(used_gib_after) not in (0, TESTBED_GPUS):
        raise InputError(f"{row.where}: used_gib_after must be the memory of {TESTBED_GPUS} GPUs")
    return RecordedDeployment(
        endpoint_id=row.count("model_id", minimum=1),
        model_name=row.text("model"),
        requested_us=_time_us(row, "deploy_s"),
        registered_us=_time_us(row, "registered_s") if row.cells["registered_s"] else None,
        plan=_plan(row) if row.count("deployed") else None,
        used_gib_after=used_gib_after,
    )


def _plan(row: Row) -> RecordedPlan:
    split = _list(row, "layer_split", int, maximum=_MAX_LAYERS)
    configuration = ParallelConfig(
        tp=row.count("tp"),
        pp=row.count("pp"),
        weights=choice(row, "weight_dtype", WeightType),
        kv=KvType.INT8 if row.count("int8_kv") else KvType.NATIVE,
        layer_split=split,
    )
    return RecordedPlan(
        configuration=configuration.normalised(sum(split)),
        gpu_ids=_list(row, "gpus", int, maximum=TESTBED_GPUS - 1),
        gib_per_gpu=_list(row, "est_gib_per_gpu", float, maximum=_MAX_GIB),
    )


def _list(row: Row, column: str, number: Callable[[str], _Number], *, maximum: float) -> tuple[_Number, ...]:
    """Return the space-separated numbers of a cell, each from 0 to `maximum`."""
    try:
        found = tuple(map(number, row.cells[column].split()))
    except ValueError:
        raise InputError(f"{row.where}: {column} must be numbers, not {row.cells[column]!r}") from None
    if not all(0 <= value <= maximum for value in found):
        raise InputError(f"{row.where}: {column} must be numbers from 0 to {maximum:g}, not {row.cells[column]!r}")
    return found
